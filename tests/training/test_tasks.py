"""Prompts: order, held-out separation, rendering, and what bad files are told."""

import dataclasses
import json
from itertools import islice

import pytest

from loaded_tasks import load_task
from reinforce_ada.config import TaskConfig
from reinforce_ada.errors import InputError
from reinforce_ada.rewards import exact_match
from reinforce_ada.training.models import tiny_tokenizer
from reinforce_ada.training.tasks import content_key, load_records, render


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
    task = load_task(letters, tokenizer, 0, 0)
    held_out = {p.data["question"] for p in task.held_out}
    prompts = list(islice(task.train(0), 10))
    first, second = ([p.data["question"] for p in part] for part in (prompts[:5], prompts[5:]))
    assert len(held_out) == 2
    assert len(set(first)) == 5
    assert set(first) == set(second)
    assert not held_out & set(first)
    assert len({p.prompt_id for p in prompts}) == 10


def test_a_stream_resumes_at_its_position(letters, tokenizer):
    task = load_task(letters, tokenizer, 0, 0)
    stream = task.train(0)
    list(islice(stream, 3))
    resumed = task.train(stream.position)
    assert [p.prompt_id for p in islice(resumed, 4)] == [p.prompt_id for p in islice(task.train(0), 3, 7)]


def test_a_record_keeps_its_key_over_epochs_and_places_and_a_changed_one_gets_another(tmp_path, letters, tokenizer):
    def keys(config, start, num):
        return {p.data["question"]: p.key for p in islice(load_task(config, tokenizer, 0, 0).train(start), num)}

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
    prompts = list(islice(load_task(TaskConfig(), tokenizer, 0, 0).train(0), 300))
    questions = {p.data["question"] for p in prompts}
    assert len({p.prompt_id for p in prompts}) == 300
    assert len({p.key for p in prompts}) == len(questions) < 300


def test_seed_changes_the_order(letters, tokenizer):
    a, b = ([p.data["question"] for p in islice(load_task(letters, tokenizer, s, 0).train(0), 5)] for s in (0, 1))
    assert a != b


def test_reasoning_gym_never_trains_on_a_held_out_question(tokenizer):
    config = TaskConfig(eval_prompts=64)
    task, reward = load_task(config, tokenizer, 0, 0), load_records(config, 0, 0).reward
    questions = {p.data["question"] for p in task.held_out}
    assert len(questions) == 64
    assert not questions & {p.data["question"] for p in islice(task.train(0), 500)}
    answer = str(task.held_out[0].data["answer"])
    assert reward(task.held_out[0], answer) == 1.0
    assert reward(task.held_out[0], "no number") == 0.0


def test_all_questions_held_out_is_an_error_not_an_endless_loop(tokenizer):
    task = load_task(TaskConfig(eval_prompts=1000), tokenizer, 0, 0)  # there are some 200 one-digit sums of two terms
    with pytest.raises(InputError, match="every training question is also held out"):
        next(task.train(0))


def test_rendering(letters, tokenizer):
    assert load_task(letters, tokenizer, 0, 0).held_out[0].text.startswith("u|q")
    chat = load_task(dataclasses.replace(letters, system_prompt="Be brief."), tokenizer, 0, 0).held_out[0]
    assert chat.text.startswith("s|Be brief.<end>u|q")
    assert chat.text.endswith("<end>a|")
    assert tokenizer.decode(chat.token_ids) == chat.text
    plain = TaskConfig(task=letters.task, num_examples=1, eval_prompts=2, template="plain", system_prompt="")
    lines = load_task(plain, tokenizer, 0, 0).held_out[0].text.split("\n")
    assert len(lines) == 4
    assert lines[3] == ""


def test_no_chat_template_is_said(letters):
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match=r"no chat template.*--template plain"):
        load_task(letters, bare, 0, 0)


def test_a_store_knows_the_file_its_questions_came_from(letters):
    before = load_records(letters, 0, 0).digest
    with open(letters.task, "a") as f:
        f.write('{"prompt": "new", "answer": 0}\n')
    assert load_records(letters, 0, 0).digest != before


def test_too_few_records_and_unknown_names(tmp_path, letters, tokenizer):
    with pytest.raises(InputError, match="8 records; more than num_examples"):
        load_task(TaskConfig(task=letters.task, eval_prompts=8), tokenizer, 0, 0)
    with pytest.raises(InputError, match="cannot read"):
        load_task(TaskConfig(task=str(tmp_path / "none.jsonl")), tokenizer, 0, 0)
    with pytest.raises(InputError, match="did you mean 'chain_sum'"):
        load_task(TaskConfig(task="chain_sums"), tokenizer, 0, 0)
    with pytest.raises(InputError, match="chain_sum does not take"):
        load_task(TaskConfig(task_options={"max_term": 3}), tokenizer, 0, 0)


# -------------------- seeds and splits


@pytest.mark.parametrize("task", ["letters", "chain_sum"])
def test_the_order_is_of_one_seed_and_the_split_of_another(letters, task):
    config = letters if task == "letters" else TaskConfig(eval_prompts=16)

    def of(seed, data_seed):
        records = load_records(config, seed, data_seed)
        order = [records.train.at(i)[1]["question"] for i in range(6)]
        return [r["question"] for r in records.held_out], records.examples, order, [records.warm_up.at(i)[1] for i in range(6)]

    first, other_seed, other_data = of(0, 0), of(1, 0), of(0, 1)
    assert (first[0], first[1], first[3]) == (other_seed[0], other_seed[1], other_seed[3])
    assert first[2] != other_seed[2]
    assert first[0] != other_data[0]
    assert first[3] != other_data[3]


def test_a_question_is_held_out_once_and_never_trained_on(tmp_path, tokenizer):
    config = jsonl(tmp_path / "twice.jsonl", [{"prompt": f"q{i % 4}", "answer": i % 4} for i in range(20)])
    for data_seed in range(10):
        task = load_task(config, tokenizer, 0, data_seed)
        held_out = [p.data["question"] for p in task.held_out]
        assert len(set(held_out)) == 2 == len(held_out)
        assert not {p.data["question"] for p in islice(task.train(0), 30)} & set(held_out)
    with pytest.raises(InputError, match="every training question is also held out"):
        load_task(TaskConfig(task=config.task, num_examples=0, eval_prompts=4), tokenizer, 0, 0)


# -------------------- worked examples


@pytest.mark.parametrize("name", ["graph_color", "rush_hour"])
def test_no_example_shows_an_answer_that_there_is_none_of(tokenizer, name):
    task = load_task(TaskConfig(task=name, num_examples=2, eval_prompts=1), tokenizer, 0, 0)
    assert "None" not in task.held_out[0].text
    assert task.notes == (f"0 worked examples instead of 2: no more records of {name} have an answer to show",)


def test_examples_are_the_records_that_have_answers(tmp_path, tokenizer):
    records = [{"prompt": f"q{i}", **({"answer": ["yes", "Yes"]} if i == 5 else {})} for i in range(8)]
    config = TaskConfig(task=jsonl(tmp_path / "some.jsonl", records).task, num_examples=2, eval_prompts=2, reward="m:f", system_prompt="")
    task = load_task(config, tokenizer, 0, 0)
    assert task.held_out[0].text.startswith("u|q5<end>a|yes<end>u|q")
    assert task.notes == (f"1 worked examples instead of 2: no more records of {config.task} have an answer to show",)


def test_a_list_of_answers_means_any_of_them(tmp_path, tokenizer):
    config = jsonl(tmp_path / "any.jsonl", [{"prompt": f"q{i}", "answer": ["Paris", 3]} for i in range(6)])
    prompt = load_task(config, tokenizer, 0, 0).held_out[0]
    assert [exact_match(prompt, text) for text in ("Paris", "3.0", "paris")] == [1.0, 1.0, 0.0]


# -------------------- templates

RAISES = "{{ raise_exception('System role not supported') }}"
LOOP = "{{ m.role[0] }}|{{ m.content }};"
FOLDED = "u|Be brief.\n\nq;a|1;u|r;"
# What a template does with a system message, the text of the prompt, and whether something is said.
TEMPLATES = [
    ("takes it", f"{{% for m in messages %}}{LOOP}{{% endfor %}}", "s|Be brief.;u|q;a|1;u|r;", False),
    ("raises", f"{{% for m in messages %}}{{% if m.role == 'system' %}}{RAISES}{{% endif %}}{LOOP}{{% endfor %}}", FOLDED, True),
    ("leaves it out", f"{{% for m in messages %}}{{% if m.role != 'system' %}}{LOOP}{{% endif %}}{{% endfor %}}", FOLDED, True),
    (
        "divides by zero",
        f"{{% for m in messages %}}{LOOP}{{% if m.role == 'system' %}}{{{{ 1 // 0 }}}}{{% endif %}}{{% endfor %}}",
        FOLDED,
        True,
    ),
]


def templated(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def two_questions(tmp_path, **options):
    records = [{"prompt": "q", "answer": 1}, *({"prompt": "r"} for _ in range(3))]
    path = jsonl(tmp_path / "two.jsonl", records).task
    return TaskConfig(task=path, num_examples=1, eval_prompts=0, reward="m:f", **{"system_prompt": "Be brief.", **options})


@pytest.mark.parametrize(("template", "text", "is_said"), [t[1:] for t in TEMPLATES], ids=[t[0] for t in TEMPLATES])
def test_a_system_message_has_a_place_in_every_template(tmp_path, template, text, is_said):
    task = render(load_records(two_questions(tmp_path), 0, 0), two_questions(tmp_path), templated(template), longest=1000)
    assert next(task.train(0)).text == text
    said = ("the chat template has no place for a system message: its text stands at the head of the first user message",)
    assert task.notes == (said if is_said else ())


def test_without_a_system_prompt_nothing_is_said(tmp_path):
    config = two_questions(tmp_path, system_prompt="")
    task = render(load_records(config, 0, 0), config, templated(TEMPLATES[1][1]), longest=1000)
    assert (next(task.train(0)).text, task.notes) == ("u|q;a|1;u|r;", ())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (RAISES, r"the chat template raises on a user's message: System role not supported; .*; --template plain"),
        ("{{ messages[7].content }}", "the chat template raises on a user's message"),
        ("nothing", "the chat template leaves out the user's message; one that shows it; --template plain"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ 1 // 0 }}{% endif %}{{ m.content }}{% endfor %}",
            "raises on 'r': .*zero",
        ),
        ("{% for", "the chat template raises on a user's message"),
    ],
)
def test_a_template_that_takes_no_conversation_is_one_line(tmp_path, template, said):
    config = two_questions(tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        render(load_records(config, 0, 0), config, templated(template), longest=1000)
    assert "\n" not in str(caught.value)


def test_messages_are_a_conversation_with_its_own_system_message(tmp_path, tokenizer):
    turns = [("system", "Own."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    config = jsonl(tmp_path / "chat.jsonl", [{"prompt": messages, "answer": i} for i in range(3)])
    config = TaskConfig(task=config.task, num_examples=0, eval_prompts=0)
    assert next(load_task(config, tokenizer, 0, 0).train(0)).text == "s|Own.<end>u|a<end>a|b<end>u|c<end>a|"


# -------------------- prompts that are too long


def with_long_ones(tmp_path, lengths):
    path = jsonl(tmp_path / "long.jsonl", [{"prompt": f"{i}" + "x" * n, "answer": 1} for i, n in enumerate(lengths)]).task
    return TaskConfig(task=path, num_examples=0, eval_prompts=0, template="plain", system_prompt="")


def test_long_prompts_of_a_file_are_counted_at_the_start_and_never_drawn(tmp_path, tokenizer):
    config = with_long_ones(tmp_path, [5, 60, 5, 90, 5])
    task = render(load_records(config, 0, 0), config, tokenizer, longest=50)
    said = "2 of 5 training prompts are longer than max_model_len - max_tokens = 50 tokens and are never drawn"
    assert task.notes == (f"{said}; --max-model-len takes them when it is higher by 42",)
    stream = task.train(0)
    assert {len(p.token_ids) for p in islice(stream, 9)} == {7}
    assert stream.num_too_long >= 2
    resumed = task.train(stream.position)
    assert [p.prompt_id for p in islice(resumed, 5)] == [p.prompt_id for p in islice(stream, 5)]


def test_where_most_prompts_are_too_long_the_run_is_refused(tmp_path, tokenizer):
    config = with_long_ones(tmp_path, [5, 60, 70, 90, 5])
    with pytest.raises(
        InputError, match=r"^task: 3 of 5 training prompts are longer than .* = 50 tokens; most of them to fit; --max-model"
    ):
        render(load_records(config, 0, 0), config, tokenizer, longest=50)


def test_a_held_out_prompt_that_is_too_long_is_named(tmp_path, tokenizer):
    config = with_long_ones(tmp_path, [5, 60, 5, 5, 5])
    config = TaskConfig(task=config.task, num_examples=0, eval_prompts=4, template="plain", system_prompt="")
    data_seed = next(s for s in range(9) if any("xxxxxx" in r["question"] for r in load_records(config, 0, s).held_out))
    with pytest.raises(
        InputError, match=r"^task: 1 of 4 held-out prompts are too long, such as '1xx.* with 62 tokens; .* = 50 tokens; .* by 12$"
    ):
        render(load_records(config, 0, data_seed), config, tokenizer, longest=50)


def test_long_prompts_of_a_generator_are_left_out_as_they_are_drawn(tokenizer):
    config = TaskConfig(task="chain_sum", task_options={"max_terms": 6, "max_digits": 3}, num_examples=0, eval_prompts=0, system_prompt="")
    lengths = [len(p.token_ids) for p in islice(load_task(config, tokenizer, 0, 0).train(0), 40)]
    longest = sorted(lengths)[20]
    stream = render(load_records(config, 0, 0), config, tokenizer, longest=longest).train(0)
    assert [len(p.token_ids) for p in islice(stream, 20)] == [n for n in lengths if n <= longest][:20]
    assert stream.num_too_long > 0
    with pytest.raises(InputError, match="10000 questions in a row are too long; 3 tokens at most; --max-model-len"):
        next(render(load_records(config, 0, 0), config, tokenizer, longest=3).train(0))
