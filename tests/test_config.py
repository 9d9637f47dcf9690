"""The typed configuration: file, overrides, errors that name the nearest valid key."""

import dataclasses
import json

import pytest

from reinforce_ada import config
from reinforce_ada.errors import InputError
from reinforce_ada.sampling import presets


def test_defaults_are_the_demo():
    c = config.load()
    assert (c.model.model, c.task.task) == ("smollm2", "chain_sum")
    assert (c.sampling.preset, c.sampling.schedule) == ("reinforce-ada-balance", "stream")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nsteps = 7\nlearning_rate = 1e-4\n[task]\ntask_options = {max_terms = 3}\n")
    c = config.load(file, {"steps": "9", "entropy_coef": "0.5", "group_size": "6"})
    assert (c.training.steps, c.training.learning_rate, c.training.entropy_coef) == (9, 1e-4, 0.5)
    assert c.task.task_options == {"max_terms": 3}
    assert c.sampling.group_size == 6


@pytest.mark.parametrize(("given", "window"), [("4", 4), ("posterior", "posterior")])
def test_a_window_is_a_number_or_posterior(given, window):
    assert config.load(None, {"window": given}).sampling.window == window


@pytest.mark.parametrize(
    ("given", "stop"),
    [("</answer>", ["</answer>"]), ('["a", "[b]"]', ["a", "[b]"]), ("[]", []), ("\n\n", ["\n\n"])],
)
def test_stop_strings_are_one_text_or_a_list(given, stop):
    assert config.load(None, {"stop": given}).sampling.stop == stop


@pytest.mark.parametrize(("given", "sleep"), [("false", False), ("true", True), ("0", False)])
def test_a_switch(given, sleep):
    assert config.load(None, {"sleep": given}).engine.sleep is sleep


def test_what_is_no_switch_is_said():
    with pytest.raises(InputError, match="sleep = 'maybe'; true or false"):
        config.load(None, {"sleep": "maybe"})


@pytest.mark.parametrize("given", ["[end]", "[1, 2]", '["a"'])
def test_what_is_no_list_of_stop_strings_is_said(given):
    with pytest.raises(InputError, match=r'text, or a list of texts such as \["</answer>", "\[end\]"\]'):
        config.load(None, {"stop": given})


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match=r"stop = \[''\]; strings that are not empty"):
        config.load(None, {"stop": ""})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_rate_needs_a_last_step_that_is_known(schedule):
    config.load(None, {"lr_schedule": schedule, "steps": 5})
    config.load(None, {"budget": "9 trained tokens"})
    with pytest.raises(InputError, match=f"^config: lr_schedule {schedule} with a budget; a run whose last step is known"):
        config.load(None, {"lr_schedule": schedule, "budget": "9 trained tokens"})


def test_dump_and_load_give_the_same_configuration(tmp_path):
    c = config.load(None, {"task_options": '{"max_terms": 3, "name": "a\\"b"}', "system_prompt": "line\none", "window": 3, "reward": "m:f"})
    file = tmp_path / "c.toml"
    file.write_text(config.dump(c))
    assert config.load(file) == c


@pytest.mark.parametrize(
    "overrides",
    [
        {"system_prompt": 'Réponds 🎯 with "one"\tnumber\x7f'},
        {"task_options": '{"nested": {"a b": [1, 2.5, true]}, "": "empty key"}'},
        {"learning_rate": "1e-300"},
        {"stop": '["\\n\\n", "]", "\\""]'},
    ],
)
def test_whatever_a_run_starts_with_it_can_resume_with(tmp_path, overrides):
    c = config.load(None, overrides)
    file = tmp_path / "c.toml"
    file.write_text(config.dump(c), encoding="utf-8")
    assert config.load(file) == c


def test_an_option_toml_cannot_hold_is_said():
    with pytest.raises(InputError, match="values that TOML can hold"):
        config.dump(config.load(None, {"task_options": '{"a": null}'}))


def test_keys_are_unique_over_sections():
    names = [f.name for _, cls in config.sections() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) == len(config.section_of())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nlearning_rat = 1.0", "did you mean 'learning_rate'?"),
        ("[training]\nlr = 1.0", "unknown key 'lr'; known: budget, "),
        ("[training]\nlr = 1.0", "weight_decay; did you mean 'learning_rate'?"),
        ("[training]\noutput_dir = 'x'", "weight_decay; 'out' belongs to the table [run]"),
        ("[training]\nmax_tokens = 5", "weight_decay; 'max_tokens' belongs to the table [sampling]"),
        ("steps = 1", "steps above the first table; the table [training] for it"),
        ("[trainin]\nsteps = 1", "did you mean 'training'?"),
        ("[training]\nsteps = 'many'", "steps = 'many'"),
        ("[training]\nsteps = 1.5", "steps = 1.5"),
        ("[training]\nsteps = -1", "steps = -1; an integer from 0 to 1000000000"),
        ("[sampling]\ntemperature = 0.0", "a number from 0.01 to 100"),
        ("[training]\nlearning_rate = inf", "a number above 0 and up to 1"),
        ("[training]\nentropy_coef = nan", "a number from 0 to 1000000"),
        ("[training]\nclip_low = -1.0", "a number from 0 to 1"),
        ("[sampling]\nmax_tokens = 512", "raise --max-model-len"),
        ("[sampling]\nmemory_decay = 1.5", "a number above 0 and up to 1"),
        ("[sampling]\nmemory_decay = 0.0", "memory_decay = 0.0"),
        ("[sampling]\nschedule = 'strem'", "schedule = 'strem'; one of stream, rounds"),
        ("[sampling]\nschedule = 3", "schedule = 3; one of stream, rounds"),
        ("[sampling]\npreset = 'gpro'", "reinforce-ada-memory; did you mean 'grpo'?"),
        ("[model]\nmodel = 3", "model = 3; text (in quotes in a file), or one of smollm2, gemma3-270m, tiny"),
        ("[task]\ntask_options = 3", "task_options = 3; a table such as"),
        ("[sampling]\nobjective = 'median'", "objective = 'median'; one of as-published, mean, log, power"),
        ("[sampling]\nwindow = 'wide'", "window = 'wide'; an integer from 1 to 1000000, or posterior"),
        ("training = 3", "a table [training]"),
        ("[training\n", "is not TOML"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        config.load(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_is_said_with_the_file_that_has_it_and_not_if_a_flag_wins_over_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nsteps = -1\n")
    with pytest.raises(InputError, match=rf"^{file} \[training\]: steps = -1; an integer from 0 to 1000000000$"):
        config.load(file)
    assert config.load(file, {"steps": 3}).training.steps == 3
    with pytest.raises(InputError, match=r"^config \[sampling\]: window = 0; an integer from 1 to 1000000, or posterior$"):
        config.load(file, {"steps": 3, "window": 0})


def test_missing_file_and_unknown_override(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(InputError, match="did you mean 'prompts_per_step'"):
        config.load(None, {"prompt_per_step": "1"})


def test_every_key_survives_the_command_line():
    values = {k: v for section in dataclasses.asdict(config.load()).values() for k, v in section.items() if v is not None}
    text = {k: json.dumps(v) if isinstance(v, dict) else str(v) for k, v in values.items()}
    assert config.load(None, text) == config.load()


def test_the_keys_of_a_policy_are_those_that_make_one():
    assert set(config.POLICY_KEYS) == {*presets.CONFIGURED, "propose"}
    of_sampling = {f.name for f in dataclasses.fields(config.SamplingConfig)}
    assert of_sampling - set(config.POLICY_KEYS) == {
        "preset", "schedule", "prompts_per_step", "window", "temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "memory_decay",
        "memory_from",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["flag", "file", "list"])
def test_credentials_in_a_url_are_refused_and_not_repeated(form, tmp_path):
    url = "http://host:1, http://user:secret@host:2"
    path = tmp_path / "run.toml"
    path.write_text({"flag": "", "file": f'[engine]\nservers = "{url}"', "list": f'[engine]\nservers = ["{url}"]'}[form])
    with pytest.raises(InputError) as caught:
        config.load(path, {"servers": url} if form == "flag" else {})
    assert "secret" not in str(caught.value)
    assert "VLLM_API_KEY holds the key" in str(caught.value) or form == "list"


@pytest.mark.parametrize("url", ["host:8000", "http://host:99999", "http://host:1,ftp://host"])
def test_what_is_no_server_is_said(url):
    with pytest.raises(InputError, match="URLs such as http://host:8000"):
        config.load(None, {"servers": url})
