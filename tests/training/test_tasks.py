"""Prompts: order, held-out separation, rendering, and what bad files are told."""

import json
from itertools import islice

import pytest

from reinforce_ada.config import TaskConfig
from reinforce_ada.errors import InputError
from reinforce_ada.training.models import tiny_tokenizer
from reinforce_ada.training.tasks import content_key, load_records, load_task, read_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def jsonl(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return TaskConfig(task=str(path), num_examples=1, eval_prompts=2)


@pytest.fixture
def letters(tmp_path):
    return jsonl(tmp_path / "letters.jsonl", [{"prompt": f"q{i}", "answer": i} for i in range(8)])


def test_an_epoch_visits_every_training_record_once_and_no_held_out_one(letters, tokenizer):
    task = load_task(letters, tokenizer, seed=0)
    held_out = {p.data["question"] for p in task.held_out}
    prompts = list(islice(task.train(0), 10))
    first, second = ([p.data["question"] for p in part] for part in (prompts[:5], prompts[5:]))
    assert len(held_out) == 2
    assert len(set(first)) == 5
    assert set(first) == set(second)
    assert not held_out & set(first)
    assert len({p.prompt_id for p in prompts}) == 10


def test_a_stream_resumes_at_its_position(letters, tokenizer):
    task = load_task(letters, tokenizer, seed=0)
    stream = task.train(0)
    list(islice(stream, 3))
    resumed = task.train(stream.position)
    assert [p.prompt_id for p in islice(resumed, 4)] == [p.prompt_id for p in islice(task.train(0), 3, 7)]


def test_a_record_keeps_its_key_over_epochs_and_places_and_a_changed_one_gets_another(tmp_path, letters, tokenizer):
    def keys(config, start, num):
        return {p.data["question"]: p.key for p in islice(load_task(config, tokenizer, seed=0).train(start), num)}

    first_epoch, second_epoch = keys(letters, 0, 5), keys(letters, 5, 5)
    assert first_epoch == second_epoch
    assert len(set(first_epoch.values())) == 5
    assert {len(key) for key in first_epoch.values()} == {16}
    # Another file: the same questions in another order, with one more field, and one answer corrected.
    changed = min(first_epoch)
    records = [{"prompt": f"q{i}", "answer": 9 if f"q{i}" == changed else i, "source": "elsewhere"} for i in reversed(range(8))]
    other = TaskConfig(task=jsonl(tmp_path / "other.jsonl", records).task, num_examples=0, eval_prompts=0)
    moved = keys(other, 0, 8)
    assert {question for question, key in first_epoch.items() if moved[question] != key} == {changed}
    assert content_key({"question": "q", "answer": 3}) != content_key({"question": "q", "answer": "3"}) != content_key({"question": "q"})


def test_a_question_a_generator_repeats_is_one_prompt_to_the_memory(tokenizer):
    prompts = list(islice(load_task(TaskConfig(), tokenizer, seed=0).train(0), 300))
    questions = {p.data["question"] for p in prompts}
    assert len({p.prompt_id for p in prompts}) == 300
    assert len({p.key for p in prompts}) == len(questions) < 300


def test_seed_changes_the_order(letters, tokenizer):
    a, b = ([p.data["question"] for p in islice(load_task(letters, tokenizer, seed=s).train(0), 5)] for s in (0, 1))
    assert a != b


def test_reasoning_gym_never_trains_on_a_held_out_question(tokenizer):
    task = load_task(TaskConfig(eval_prompts=64), tokenizer, seed=0)
    questions = {p.data["question"] for p in task.held_out}
    assert len(questions) == 64
    assert not questions & {p.data["question"] for p in islice(task.train(0), 500)}
    answer = str(task.held_out[0].data["answer"])
    assert task.reward(task.held_out[0], answer) == 1.0
    assert task.reward(task.held_out[0], "no number") == 0.0


def test_all_questions_held_out_is_an_error_not_an_endless_loop(tokenizer):
    task = load_task(TaskConfig(eval_prompts=1000), tokenizer, seed=0)  # there are some 200 one-digit sums of two terms
    with pytest.raises(InputError, match="every training question is also held out"):
        next(task.train(0))


def test_rendering(letters, tokenizer):
    chat = load_task(letters, tokenizer, seed=0).held_out[0]
    assert chat.text.startswith("s|Reply with one number and nothing else.<end>u|q")
    assert chat.text.endswith("<end>a|")
    assert tokenizer.decode(chat.token_ids) == chat.text
    plain = TaskConfig(task=letters.task, num_examples=1, eval_prompts=2, template="plain", system_prompt="")
    lines = load_task(plain, tokenizer, seed=0).held_out[0].text.split("\n")
    assert len(lines) == 4
    assert lines[3] == ""


def test_no_chat_template_is_said(letters):
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match=r"no chat template.*--template plain"):
        load_task(letters, bare, seed=0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a", "answer": 1}\n{"prompt": ', r":2 is not JSON"),
        ('{"prompt": "a"}', r":1 has no answer"),
        ('{"prompt": " ", "answer": 1}', r":1 has no prompt"),
        ('["a"]', r":1 has no prompt"),
    ],
)
def test_bad_jsonl(tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        read_jsonl(tmp_path / "bad.jsonl", needs_answer=True)


def test_answers_are_not_needed_with_a_reward_of_ones_own(tmp_path):
    (tmp_path / "free.jsonl").write_text('{"prompt": "a"}')
    assert read_jsonl(tmp_path / "free.jsonl", needs_answer=False)[0]["question"] == "a"


def test_the_prompt_is_what_is_asked_and_any_json_text_is_read(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a\u2028b", "question": "other", "answer": 1}\n', encoding="utf-8")
    (record,) = read_jsonl(tmp_path / "odd.jsonl", needs_answer=True)
    assert record["question"] == "a\u2028b"


def test_a_store_knows_the_file_its_questions_came_from(letters):
    before = load_records(letters, seed=0).digest
    with open(letters.task, "a") as f:
        f.write('{"prompt": "new", "answer": 0}\n')
    assert load_records(letters, seed=0).digest != before


def test_too_few_records_and_unknown_names(tmp_path, letters, tokenizer):
    with pytest.raises(InputError, match="8 records; more than num_examples"):
        load_task(TaskConfig(task=letters.task, eval_prompts=8), tokenizer, seed=0)
    with pytest.raises(InputError, match="cannot read"):
        load_task(TaskConfig(task=str(tmp_path / "none.jsonl")), tokenizer, seed=0)
    with pytest.raises(InputError, match="did you mean 'chain_sum'"):
        load_task(TaskConfig(task="chain_sums"), tokenizer, seed=0)
    with pytest.raises(InputError, match="chain_sum does not take"):
        load_task(TaskConfig(task_options={"max_term": 3}), tokenizer, seed=0)
