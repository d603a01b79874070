"""recipe.py: YAML and command line meet, and what is refused."""

import os

import pytest
from support.recipes import KINDS

from hf_deit import parse_recipe
from hf_deit.errors import run_script


def test_numbers_have_the_type_of_their_field(recipe):
    """PyYAML alone reads 5e-4 as a string and 20 as an int."""
    _, data, training = parse_recipe(KINDS, [recipe("learning_rate: 5e-4\nnum_train_epochs: 20\nimage_size: 32")])
    assert training.learning_rate == 5e-4
    assert isinstance(training.num_train_epochs, float) and isinstance(data.image_size, int)


def test_the_command_line_wins(recipe):
    path = recipe("num_train_epochs: 20\ndataset_name: digits")
    _, data, training = parse_recipe(KINDS, [path, "--num_train_epochs", "30"])
    assert (training.num_train_epochs, data.dataset_name) == (30, "digits")


def test_booleans_and_nothing(recipe):
    model, _, training = parse_recipe(
        KINDS, [recipe("use_distillation_token: false\nbf16: false\nteacher: null\nsave_strategy: 'no'")]
    )
    assert (model.use_distillation_token, training.bf16, model.teacher) == (False, False, None)
    assert training.save_strategy.value == "no"


def test_without_a_word_the_default_recipe_is_read(recipe):
    path = recipe("dataset_name: digits")
    assert parse_recipe(KINDS, [], path)[1].dataset_name == "digits"
    assert parse_recipe(KINDS, ["--image_size", "64"], path)[1].image_size == 64


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "key 'lerning_rate', which is no key; did you mean 'learning_rate'"),
        ("xyzzy: 1", "key 'xyzzy', which is no key; --help"),
    ],
)
def test_an_unknown_key_is_refused(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(KINDS, [recipe(text)])


def test_an_unknown_option_is_refused(recipe):
    with pytest.raises(ValueError, match="'--imagesize'.*did you mean 'image_size'"):
        parse_recipe(KINDS, [recipe(""), "--imagesize", "3"])


def test_an_unreadable_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml' cannot be read"):
        parse_recipe(KINDS, [str(tmp_path / "nowhere.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="is a list; expected lines of the form"):
        parse_recipe(KINDS, [str(tmp_path / "list.yaml")])


def test_a_recipe_cannot_run_code(tmp_path):
    target = tmp_path / "ran"
    (tmp_path / "evil.yaml").write_text(f"dataset_name: !!python/object/apply:pathlib.Path.touch ['{target}']\n")
    with pytest.raises(ValueError, match="cannot be read"):
        parse_recipe(KINDS, [str(tmp_path / "evil.yaml")])
    assert not target.exists()


def test_a_value_of_the_wrong_type_names_its_option(recipe, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(KINDS, [recipe("image_size: big")])
    assert "--image_size" in capsys.readouterr().err


def test_what_transformers_refuses_is_one_line_too(recipe):
    path = recipe("eval_strategy: sometimes")
    with pytest.raises(SystemExit, match="^error: sometimes is not a valid IntervalStrategy"):
        run_script(lambda: parse_recipe(KINDS, [path]))


def test_the_default_recipe_is_reported_and_gives_way_to_what_replaces_it(recipe, capsys):
    default = recipe("hidden_size: 64\nimage_size: 16")
    model, data, _ = parse_recipe(KINDS, ["--teacher", "x"], default, {"model_name_or_path": {"hidden_size"}})
    assert (model.hidden_size, data.image_size) == (64, 16)
    assert "no recipe is named: the settings of recipe.yaml apply" in capsys.readouterr().out
    words = ["--model_name_or_path=mine"]
    model, data, _ = parse_recipe(KINDS, words, default, {"model_name_or_path": {"hidden_size"}})
    assert (model.hidden_size, data.image_size) == (None, 16)
    model, _, _ = parse_recipe(KINDS, [default, *words], None, {"model_name_or_path": {"hidden_size"}})
    assert model.hidden_size == 64  # of a recipe that was named, every key counts
    capsys.readouterr()
    parse_recipe(KINDS, [], default)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: &a 1\nimage_size: *a", "found the anchor or alias 'a'; write the value out, line 1, column 7"),
        ("a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 10}]\n" for a, b in zip("abcd", "bcde")), "alias 'a'"),
        ("seed: 1\nimage_size: 32\nseed: 2", "found the key 'seed' twice, in line 1 and in line 3; keep one"),
        ("seed: {a: 1, b: 2, a: 3}", "found the key 'a' twice"),
        ("seed: {<<: {a: 1}}", "found '<<'; write the keys out"),
        ("seed:\n\ta: 1", "line 2, column 1, indent with blanks, not tabs"),
        ("seed: 1\n---\nseed: 2", "expected a single document in the stream, but found another document"),
        ("? [1, 2]\n: 3", "found a sequence as a key; expected a name"),
        ("seed: " + "[" * 5000, "found more than 20 levels"),
        ("seed: [" + "[]," * 20_000, "found more than 2000 keys and values"),
        ("seed: 1\n" * 20_000, "is larger than 65,536 bytes"),
        ("seed: !!timestamp x", "a value is not what its tag says"),
        ("seed: 2020-99-99", "a value is not what its tag says (month must be in 1..12)"),
        ("seed: \x1b[2J", "special characters are not allowed in line 1 (character 0x1b)"),
        (b"\x00\xff", "'utf-8' codec can't decode byte 0xff"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_recipe_is_small_plain_data_or_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as refusal:
        parse_recipe(KINDS, [str(path)])
    assert message in str(refusal.value) and str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_recipe_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="is no regular file"):
            parse_recipe(KINDS, [str(path)])
