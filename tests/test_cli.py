"""The command line: it answers at once, its help is complete, and what is wrong is said in one line."""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import reinforce_ada
from reinforce_ada import cli, config
from reinforce_ada.commands import doctor, flags, train
from reinforce_ada.config import values
from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.ops.policy_loss import LOSSES
from reinforce_ada.rewards.names import BUILT_IN as REWARDS
from reinforce_ada.sampling import PRESETS
from reinforce_ada.training.built_in import NAMES as MODELS

ONE_LINE = re.compile(r"reinforce-ada( \w+)?: [^\n]+: [^\n]+; [^\n]+\n")
COMMANDS = (
    "doctor",
    "train",
    "eval",
    "report",
    "explain",
    "simulate",
    "study",
    "export",
    "push",
    "serve",
    "bench",
    "completion",
)  # as a newcomer needs them


def say(capsys, *arguments) -> tuple[int, str]:
    """Exit code and stderr of one command in this process."""
    capsys.readouterr()
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


# -------------------- help


def test_help_answers_within_three_tenths_of_a_second_without_torch():
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(reinforce_ada.__file__))}
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "reinforce_ada", "--help"], capture_output=True, text=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)  # of the processor: another test may run beside
        assert done.returncode == 0
        assert all(command in done.stdout for command in COMMANDS)
    assert statistics.median(seconds) < 0.3
    trace = [sys.executable, "-X", "importtime", "-m", "reinforce_ada", "train", "--help"]
    loaded = subprocess.run(trace, capture_output=True, text=True, env=environment, check=True).stderr
    assert "reinforce_ada.config" in loaded
    assert not re.search(r"\| +(torch|numpy|transformers|argcomplete|vllm)$", loaded, re.MULTILINE)


# -------------------- what argparse finds


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("train --stepz 3", "reinforce-ada train: unknown flag '--stepz'; did you mean '--steps'?; see reinforce-ada train --help"),
        ("train --stepz=3", "reinforce-ada train: unknown flag '--stepz'; did you mean '--steps'?; see reinforce-ada train --help"),
        ("eval m --minibatches 3", "reinforce-ada eval: unknown flag '--minibatches'; see reinforce-ada eval --help"),
        ("doctor --chek", "reinforce-ada doctor: unknown flag '--chek'; did you mean '--check'?; see reinforce-ada doctor --help"),
        (
            "train --learning 1",
            "reinforce-ada train: unknown flag '--learning'; did you mean '--learning-rate'?; see reinforce-ada train --help",
        ),
        ("--steps 3", "reinforce-ada: unknown flag '--steps'; a command comes first, such as train; see reinforce-ada --help"),
        ("train --lr 1", "reinforce-ada train: unknown flag '--lr'; did you mean '--learning-rate'?; see reinforce-ada train --help"),
        ("train --output_dir=x", "reinforce-ada train: unknown flag '--output_dir'; did you mean '--out'?; see reinforce-ada train --help"),
        ("eval m --lr 1", "reinforce-ada eval: unknown flag '--lr'; see reinforce-ada eval --help"),
        (
            "train run.toml",
            "reinforce-ada train: unexpected argument 'run.toml'; did you mean '--config run.toml'?; see reinforce-ada train --help",
        ),
        ("report run.toml more.toml", "reinforce-ada report: unexpected argument 'more.toml'; see reinforce-ada report --help"),
        ("train now", "reinforce-ada train: unexpected argument 'now'; see reinforce-ada train --help"),
        ("train --steps", "reinforce-ada train: argument --steps: expected one argument; see reinforce-ada train --help"),
        ("eval", "reinforce-ada eval: the following arguments are required: MODEL; see reinforce-ada eval --help"),
        ("study s --jobs 0", "reinforce-ada study: argument --jobs: '0'; an integer from 1 to 1024; see reinforce-ada study --help"),
        (
            "bench --device gpu",
            "reinforce-ada bench: argument --device: 'gpu'; one of cpu, cuda; did you mean 'cpu'?; see reinforce-ada bench --help",
        ),
    ],
)
def test_arguments_that_do_not_parse(capsys, line, error):
    assert say(capsys, *line.split()) == (2, error + "\n")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("trian", "train"), ("evaluate", "eval"), ("Report", "report"), ("help", "--help"), ("version", "--version"), ("x", "")],
)
def test_an_unknown_command_is_told_the_commands_and_the_nearest(capsys, typed, meant):
    hint = f"; did you mean {meant!r}?" if meant else ""
    error = f"reinforce-ada: unknown command {typed!r}; known: {', '.join(COMMANDS)}{hint}; see reinforce-ada --help\n"
    assert say(capsys, typed) == (2, error)


# -------------------- what the configuration, the files and the folders get wrong


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model that has learned nothing: to be loaded, not to be right."""
    from reinforce_ada.training.models import build_tiny, tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, tiny_tokenizer(), [("q", "1")], seed=0, num_updates=0)
    return folder


@pytest.fixture
def world(tmp_path, monkeypatch, model):
    """A folder with what the lines below name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    good = [json.dumps({"prompt": f"q{i}", "answer": i}) for i in range(12)]
    (tmp_path / "good.jsonl").write_text("\n".join(good) + "\n")
    (tmp_path / "no_answer.jsonl").write_text("\n".join([*good[:3], '{"prompt": "q"}']) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "not_json.jsonl").write_text("{prompt: q}\n")
    (tmp_path / "key.toml").write_text("[training]\nlearning_rat = 1.0\n")
    (tmp_path / "cli_reward.py").write_text("score = 0.5\n\ndef three(a, b, c):\n    return 0.0\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run/log.jsonl").write_text("")
    (tmp_path / "model").symlink_to(model)
    yield tmp_path
    sys.modules.pop("cli_reward", None)


TRAIN = "train --model model --task good.jsonl --eval-prompts 4 --engine transformers --device cpu --out new"

# (line, what the error must say). TRAIN is a line that would run.
BAD = [
    ("train --config key.toml", "key.toml [training]: unknown key 'learning_rat'", "did you mean 'learning_rate'?"),
    ("train --config empty.jsonl", "config: empty.jsonl is named like a file of questions", "a TOML file; --task empty.jsonl"),
    ("train --config none.toml", "config: cannot read none.toml", "a readable TOML file"),
    ("train --steps many", "argument --steps: 'many'", "an integer from 0 to 1000000000"),
    ("train --temperature 0", "argument --temperature: '0'", "a number from 0.01 to 100"),
    ("train --engine vlm", "argument --engine: 'vlm'", "did you mean 'vllm'?"),
    ("train --config key.toml --resume a_run", "train: --resume and --config", "one of them"),
    ("train --resume folder", "train: folder holds no run", "a folder that `reinforce-ada train` wrote"),
    ("train --resume none", "train: none holds no run", "a folder that `reinforce-ada train` wrote"),
    (f"{TRAIN} --preset reinforce-ada-balanced", "argument --preset: 'reinforce-ada-balanced'", "did you mean 'reinforce-ada-balance'?"),
    (f"{TRAIN} --group-size 0", "argument --group-size: '0'", "an integer from 1 to 1000000"),
    (f"{TRAIN} --group-size 33", "group_size 33", "cap"),
    (f"{TRAIN} --preset grpo --round-size 4", "round_size", "grpo"),
    (f"{TRAIN} --out a_run", "train: a_run holds log.jsonl", "an empty folder, or one that is not there yet"),
    (f"{TRAIN} --out file/below", "train: cannot write to file/below", "a writable folder"),
    (f"{TRAIN} --model folder", "folder has no config.json", "a folder that transformers' save_pretrained wrote"),
    (f"{TRAIN} --model ./none", "model: './none' is no folder", "smollm2, gemma3-270m, tiny, a model folder or a hub id"),
    (f"{TRAIN} --model smollm", "model: 'smollm' is no folder", "smollm2, gemma3-270m, tiny, a model folder or a hub id"),
    (f"{TRAIN} --task chain_sums", "unknown reasoning-gym dataset 'chain_sums'", "did you mean 'chain_sum'?"),
    (f"{TRAIN} --task none.jsonl", "task: cannot read none.jsonl", "a JSONL file"),
    (f"{TRAIN} --task no_answer.jsonl", "task: no_answer.jsonl:4 has no answer", "--reward module:function"),
    (f"{TRAIN} --task empty.jsonl", "task: empty.jsonl holds no prompts", "at least one record"),
    (f"{TRAIN} --task blank.jsonl", "task: blank.jsonl holds no prompts", "at least one record"),
    (f"{TRAIN} --task not_json.jsonl", "task: not_json.jsonl:1 is not JSON", '{"prompt": ..., "answer": ...}'),
    (f"{TRAIN} --eval-prompts 12", "task: good.jsonl has 12 records", "more than num_examples + eval_prompts = 12"),
    (f"{TRAIN} --task chain_sum --task-options {{\"min_termz\":2}}", "task: chain_sum does not take", "min_termz"),
    (f"{TRAIN} --reward cli_reward:score", "reward 'cli_reward:score'", "callable"),
    (f"{TRAIN} --reward cli_reward:scores", "has no attribute 'scores'", "a function of that module"),
    (f"{TRAIN} --reward cli_reward:three", "reward 'cli_reward:three'", "(prompt, completion text) -> float"),
    (f"{TRAIN} --reward no_such_module:score", "No module named 'no_such_module'", "an importable module"),
    (f"{TRAIN} --reward score", "reward 'score'", '"module:function"'),
    (f"{TRAIN} --schedule rounds --window 4", "window 4 with schedule 'rounds'", "leave it out"),
    (f"{TRAIN} --window 0", "argument --window: '0'", "an integer from 1 to 1000000, or posterior"),
    ("eval folder", "model: folder has no config.json", "a folder that transformers' save_pretrained wrote"),
    ("eval tiny", "eval: the model 'tiny'", "a model folder"),
    ("bench policy_los", "unknown operator 'policy_los'", "did you mean 'policy_loss'?"),
    ("bench --case fwd", "no case has 'fwd' in its name", "reinforce-ada bench --list"),
    ("bench --quick --json none/b.json", "--json none/b.json", "a file in a folder that exists"),
    ("report folder", "report: folder", "a folder that `reinforce-ada train` wrote"),
    ("report none", "report: none", "a folder that `reinforce-ada train` wrote"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "given", "needed"), BAD, ids=[line.replace(TRAIN, "train ..") for line, *_ in BAD])
def test_bad_input_is_one_line_and_exit_2(world, capsys, line, given, needed):
    code, error = say(capsys, *line.split())
    assert code == 2
    assert given in error
    assert needed in error
    assert ONE_LINE.fullmatch(error)
    assert "Traceback" not in error


@pytest.mark.parametrize("wrong", ["--reward no_such_module:score", "--task none.jsonl", "--model ./none", "--group-size 33"])
def test_a_wrong_first_attempt_leaves_no_run_behind(world, capsys, wrong):
    for _ in range(2):  # the second one is not told that there is a run
        code, error = say(capsys, *f"{TRAIN} {wrong}".split())
        assert code == 2
        assert "holds a run already" not in error


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    code, error = say(capsys, "train")
    assert code == 130
    assert "--resume DIR" in error


# (what a command raises, the exit code, what is said)
ENDS = [
    (EngineLost("engine: no replica for 9 s (r0: \x1b[2Jkilled)"), 3, "reinforce-ada: engine: no replica for 9 s (r0: \\x1b[2Jkilled)\n"),
    (InputError("a", "b\nc\r\x07", "d"), 2, "reinforce-ada: a: b c \\x07; d\n"),
    (
        OSError(36, "File name too long", "x\x1b"),
        2,
        "reinforce-ada: files: cannot use x\\x1b: File name too long; a file or ",
    ),
    (
        OSError(28, "No space left on device"),
        2,
        "reinforce-ada: files: cannot write to the disk: No space left on device;",
    ),
    (MemoryError("Unable to allocate 16. GiB"), 2, "reinforce-ada: memory: Unable to allocate 16. GiB; a smaller size"),
    (
        ModuleNotFoundError("No module", name="rich.text"),
        2,
        'reinforce-ada: doctor: rich is not installed; pip install "reinforce-ada[train]"',
    ),
]


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=[type(e).__name__ for e, *_ in ENDS])
def test_ends_are_one_line_that_a_terminal_shows_as_it_is(monkeypatch, capsys, error, code, line):
    monkeypatch.setattr(doctor, "run", raises(error))
    ended, said = say(capsys, "doctor")
    assert ended == code
    assert said.startswith(line)
    assert said.count("\n") == 1


def raises(error):
    def run(given):
        raise error

    return run


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module", name="ours"), OSError(107, "not connected"), ValueError("ours")])
def test_errors_that_say_nothing_to_a_user_are_kept(monkeypatch, error):
    monkeypatch.setattr(doctor, "run", raises(error))
    with pytest.raises(type(error)):
        cli.main(["doctor"])


# What a shell can pass and what it cannot; both end with one line.
ARGUMENTS = ["\x1b]0;owned\x07", "a\nb", "\udcff", "\ud800", "a\0b", "x" * 200_000, "--stepz\x1b[2J", "é漢😀", "{0}%s"]


@pytest.mark.parametrize("argument", ARGUMENTS, ids=range(len(ARGUMENTS)))
@pytest.mark.parametrize("command", ["train", "report", "explain", "bench"])
def test_what_argparse_quotes_is_escaped(capsys, tmp_path, monkeypatch, command, argument):
    monkeypatch.chdir(tmp_path)
    code, error = say(capsys, command, argument)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("reinforce-ada")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", error)


def test_the_output_of_eval_json_is_one_object_whatever_a_reward_prints(world):
    """One prompt has no standard error, which JSON has no form for."""
    reward = "import sys\nprint('loaded')\n\ndef loud(prompt, text):\n    print('scoring', flush=True)\n    return 1.0\n"
    (world / "loud_reward.py").write_text(reward)
    line = "eval model --task good.jsonl --eval-prompts 1 --eval-k 2 --reward loud_reward:loud --engine transformers --device cpu --json"
    command = [sys.executable, "-m", "reinforce_ada", *line.split(), "--dtype", "float32", "--max-tokens", "2"]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(reinforce_ada.__file__))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=world, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (task,) = found["tasks"]
    assert (task["avg_at_k"], task["stderr"], task["task"], found["model"]) == (1.0, None, "good.jsonl", "model")
    assert "maj_at_k" not in task  # this reward names no answers
    assert "scoring" in done.stderr


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch):
    def broken(given):
        raise RuntimeError("ours")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["doctor"])


def test_the_module_of_a_reward_is_found_in_the_working_folder(world):
    assert str(world) not in sys.path
    flags.import_from_here()
    flags.import_from_here()
    assert sys.path.count(str(world)) == 1
    import cli_reward

    assert cli_reward.score == 0.5


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, unbuffered):
    """As in `reinforce-ada doctor | head -0`: no traceback, whenever the text is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "reinforce_ada", "doctor"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_version_is_the_one_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)[1]
    assert capsys.readouterr().out == f"reinforce-ada {stated}\n"
    assert reinforce_ada.__version__ == stated


# -------------------- lists that stand twice


@pytest.mark.parametrize(
    ("key", "known"),
    [("preset", PRESETS), ("reward", REWARDS), ("loss", LOSSES), ("model", MODELS)],
    ids=["preset", "reward", "loss", "model"],
)
def test_the_choices_of_a_key_are_those_that_exist(key, known):
    cls = dict(config.sections())[config.section_of()[key]]
    choices = values.choices_of(values.hints_of(cls)[key])
    assert sorted(choices) == sorted(known)
