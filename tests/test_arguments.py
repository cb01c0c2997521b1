"""The recipe's command line: YAML first, flags over it, one-line errors, and the study's numbers in the YAML files."""

from pathlib import Path

import pytest

from hf_lowrank.arguments import RecipeArguments, parse_recipe
from hf_lowrank.cli import fail
from hf_lowrank.data import DataArguments
from hf_lowrank.methods import METHODS
from hf_lowrank.models import SIZES, model_config

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
# files beside those named after their method
VARIANTS = {"apollo_mini": "apollo"}


def parse(*argv, configs=CONFIGS):
    return parse_recipe([str(word) for word in argv], configs)


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a recipe's YAML file and returns its path."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(*argv):
    """The message a command line is refused with: always one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- where values come from ----


def test_yaml_values_are_the_defaults_and_flags_win(yaml_file):
    path = yaml_file("method: sltrain\nlearning_rate: 1e-2\nsparsity: 0.1\nmax_steps: 7\nsequence_length: 64\n")
    recipe = parse(path, "--max_steps", 9, "--sparsity=0.2")
    assert recipe.source == path
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (0.01, 9)
    assert (recipe.method.method, recipe.method.sparsity, recipe.data.sequence_length) == ("sltrain", 0.2, 64)


@pytest.mark.parametrize("text", ["1e-2", "0.01", "1.0e-2", "'1e-2'", "1E-2"])
def test_a_rate_in_yaml_is_a_float_however_it_is_written(text, yaml_file):
    # YAML 1.1 reads 1e-2 as a string, since it has no dot
    rate = parse(yaml_file(f"learning_rate: {text}\n")).training.learning_rate
    assert isinstance(rate, float)
    assert rate == 0.01


def test_types_in_yaml_are_those_of_the_flags(yaml_file):
    text = (
        "method: sltrain\nalpha: 16\nr: 4\nbf16: no\npacking: false\ndataset_config_name: 3\ndataset_name: a/b\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\nmax_eval_sequences: null\n"
    )
    recipe = parse(yaml_file(text))
    assert isinstance(recipe.method.alpha, float)
    assert recipe.method.r == 4
    assert recipe.training.bf16 is False
    assert recipe.data.packing is False
    assert recipe.data.dataset_config_name == "3"
    assert recipe.data.max_eval_sequences is None
    assert recipe.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_an_empty_yaml_file_leaves_the_programs_own_defaults(yaml_file):
    recipe = parse(yaml_file("# nothing yet\n"))
    assert recipe.method == METHODS["galore"]()
    assert recipe.recipe == RecipeArguments()
    assert recipe.data == DataArguments()


def test_no_argument_is_galore_on_the_embedded_default():
    recipe = parse()
    assert recipe.source == CONFIGS / "tiny" / "galore.yaml"
    assert (recipe.method.method, recipe.method.r, recipe.training.learning_rate) == ("galore", 32, 0.01)
    assert recipe.data.dataset_name is None
    assert recipe.data.dataset_path is None
    assert recipe.training.output_dir == "runs/tiny-galore"


@pytest.mark.parametrize(
    ("argv", "source"),
    [
        (["--method", "sltrain"], "tiny/sltrain.yaml"),
        (["--method=fullrank"], "tiny/fullrank.yaml"),
        (["--model_size", "60m", "--use_cpu"], "60m/galore.yaml"),
        (["--model-size", "130m", "--method", "sltrain", "--use_cpu"], "130m/sltrain.yaml"),
        (["--model_size=350m", "--method=fullrank", "--use_cpu"], "350m/fullrank.yaml"),
    ],
)
def test_size_and_method_choose_the_yaml_file(argv, source):
    recipe = parse(*argv)
    assert recipe.source == CONFIGS / source
    size, method = source.removesuffix(".yaml").split("/")
    assert (recipe.recipe.model_size, recipe.method.method) == (size, method)
    assert recipe.training.output_dir == f"runs/{size}-{method}"


def test_a_size_without_a_yaml_file_leaves_the_programs_own_defaults(tmp_path):
    recipe = parse("--method", "fullrank", configs=tmp_path)
    assert recipe.source is None
    assert recipe.recipe.total_batch_size is None


def test_the_output_folder_can_be_chosen(yaml_file):
    assert parse("--output_dir", "elsewhere").training.output_dir == "elsewhere"
    assert parse(yaml_file("output_dir: here\n")).training.output_dir == "here"


STUDY_DATA = "dataset_name: allenai/c4\ndataset_config_name: en\n"


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        (
            STUDY_DATA,
            ["--dataset_path", "x"],
            {"dataset_name": None, "dataset_config_name": None, "dataset_path": "x"},
        ),
        (STUDY_DATA, ["--dataset_name", "a/b"], {"dataset_name": "a/b", "dataset_config_name": None}),
        (
            STUDY_DATA,
            ["--dataset_name", "a/b", "--dataset_config_name", "de"],
            {"dataset_name": "a/b", "dataset_config_name": "de"},
        ),
        (STUDY_DATA, ["--dataset_config_name", "de"], {"dataset_name": "allenai/c4", "dataset_config_name": "de"}),
        (
            "dataset_path: x\ndataset_glob: '*.py'\n",
            ["--dataset_name", "a/b"],
            {"dataset_name": "a/b", "dataset_path": None, "dataset_glob": None},
        ),
        ("dataset_path: x\n", ["--dataset-name=a/b"], {"dataset_name": "a/b", "dataset_path": None}),
        ("model_size: 60m\n", ["--model_config", "x"], {"model_size": None, "model_config": "x"}),
        ("model_config: x\n", ["--model_size", "60m"], {"model_size": "60m", "model_config": None}),
        ("max_steps: 300\n", ["--num_train_epochs", "2"], {"max_steps": -1, "num_train_epochs": 2.0}),
        ("max_steps: 300\n", ["--num_train_epochs", "2", "--max_steps", "9"], {"max_steps": 9}),
        (
            "total_batch_size: 16\n",
            ["--gradient_accumulation_steps", "4"],
            {"total_batch_size": None, "gradient_accumulation_steps": 4},
        ),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n",
            ["--lr_scheduler_type", "polynomial"],
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": None},
        ),
    ],
)
def test_a_flag_displaces_what_contradicts_it_in_the_yaml_file(text, flags, expected, yaml_file):
    recipe = parse(yaml_file(text), *flags)
    for key, value in expected.items():
        part = next(p for p in (recipe.recipe, recipe.data, recipe.training) if hasattr(p, key))
        assert getattr(part, key) == value, key


@pytest.mark.parametrize("name", ["60m/galore.yaml", "1b/cola.yaml"])
def test_a_recipe_for_a_gpu_falls_back_to_float32_without_one_and_says_so(name, monkeypatch):
    recipe = parse(CONFIGS / name)
    assert not recipe.training.bf16
    assert recipe.notes == [f"{CONFIGS / name} asks for bf16, which needs a GPU that has it: float32 instead"]
    # whoever names the CPU gets the bf16 autocast that it has
    named = parse(CONFIGS / name, "--use_cpu")
    assert named.training.bf16
    assert named.notes == []
    for module in ("hf_lowrank.arguments", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
    on_gpu = parse(CONFIGS / name)
    assert on_gpu.training.bf16
    assert on_gpu.notes == []


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("bf16: yes\nbf16_full_eval: true\n", ["bf16", "bf16_full_eval"]),
        ("fp16: true\n", ["fp16"]),
        ("fp16: true\nuse_cpu: true\n", ["fp16"]),
        ("tf32: true\nuse_cpu: true\n", ["tf32"]),
        ("bf16: true\nuse_cpu: true\n", []),
        ("bf16: false\ntf32: null\nfp16: no\n", []),
    ],
)
def test_every_precision_that_needs_a_gpu_falls_back_alike(text, dropped, yaml_file):
    recipe = parse(yaml_file(text))
    assert [note.split(" asks for ")[1].split(",")[0] for note in recipe.notes] == dropped
    assert not any(getattr(recipe.training, key) for key in dropped)


def test_a_flag_that_needs_a_gpu_is_an_error_without_one(yaml_file):
    assert "bf16" in refusal("--bf16")
    recipe = parse(yaml_file("bf16: true\n"), "--bf16", "false")
    assert (recipe.training.bf16, recipe.notes) == (False, [])


def test_both_in_one_place_is_an_error(yaml_file):
    message = refusal(yaml_file("dataset_name: a/b\ndataset_path: x\n"))
    assert "dataset_name 'a/b' and dataset_path 'x' exclude each other" in message
    assert "exclude each other" in refusal("--dataset_name", "a/b", "--dataset_path", "x")
    assert "exclude each other" in refusal("--model_size", "tiny", "--model_config", "x")


@pytest.mark.parametrize("flag", ["--no_packing", "--no-packing", "--packing=false", "--packing=0"])
def test_a_switch_that_is_on_can_be_turned_off(flag, yaml_file):
    assert parse(flag).data.packing is False
    assert parse(yaml_file("packing: true\n"), flag).data.packing is False


def test_a_switch_that_yaml_turned_off_can_be_turned_on(yaml_file):
    path = yaml_file("packing: false\nstreaming: false\ndataset_name: a/b\n")
    recipe = parse(path, "--packing", "true")
    assert (recipe.data.packing, recipe.data.streaming) == (True, False)


def test_flags_may_be_written_with_dashes_and_equals_signs():
    recipe = parse("--max-steps=3", "--update-proj-gap", "5", "--weight-decay=0.1")
    assert (recipe.training.max_steps, recipe.method.update_proj_gap, recipe.training.weight_decay) == (3, 5, 0.1)


TARGETS = {
    "a name": (["q_proj"], ["q_proj"]),
    "names": (["q_proj", "self_attn.v_proj"], ["q_proj", "self_attn.v_proj"]),
    "a regular expression": ([".*layers.[01].*q_proj"], ".*layers.[01].*q_proj"),
    "all-linear": (["all-linear"], "all-linear"),
}


@pytest.mark.parametrize("method", ["galore", "sltrain", "fullrank"])
@pytest.mark.parametrize("case", TARGETS)
def test_target_modules_take_names_a_pattern_or_all_linear(case, method, yaml_file):
    words, expected = TARGETS[case]
    assert parse("--method", method, "--target_modules", *words).method.target_modules == expected
    listed = yaml_file(f"method: {method}\ntarget_modules: {words}\n")
    assert parse(listed).method.target_modules == expected
    if len(words) == 1:
        assert parse(yaml_file(f"target_modules: '{words[0]}'\n")).method.target_modules == expected


def test_no_target_modules_is_the_methods_own_default():
    assert parse().method.target_modules is None


@pytest.mark.parametrize(("text", "expected"), [("none", ["none"]), ("[spectral]", ["spectral"])])
def test_metrics_may_be_one_word_or_a_list(text, expected, yaml_file):
    assert parse(yaml_file(f"metrics: {text}\n")).recipe.metrics == expected


# ---- what is refused ----


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--method", "galor"], ["unknown method 'galor'", "did you mean 'galore'?", ", ".join(sorted(METHODS))]),
        (["--method", "xyz"], ["unknown method 'xyz'", ", ".join(sorted(METHODS))]),
        (["--method"], ["--method", "expected one argument"]),
        (["--learning_rat", "1"], ["unknown flag '--learning_rat'", "did you mean 'learning_rate'?"]),
        (["--tokeniser_name=x"], ["unknown flag '--tokeniser_name=x'", "did you mean 'tokenizer_name'?"]),
        (["--sparsity", "0.1"], ["unknown flag '--sparsity'", "it is a setting of sltrain, not of galore"]),
        (
            ["--method", "sltrain", "--update_proj_gap", "5"],
            ["unknown flag '--update_proj_gap'", "it is a setting of apollo, fira, frugal, galore, not of sltrain"],
        ),
        (["--method", "fullrank", "--r", "5"], ["unknown flag '--r'", "relora, sltrain, not of fullrank"]),
        (["--model_size", "61m"], ["--model_size 61m", "did you mean '60m'?", "tiny, 60m, 130m, 350m, 1b"]),
        (["--metrics", "spectrl"], ["--metrics spectrl", "did you mean 'spectral'?"]),
        (["--max_steps", "5", "more"], ["'more' belongs to no flag"]),
        (["--max_steps", "abc"], ["max_steps", "'abc'"]),
        (["--max_steps"], ["max_steps", "expected one argument"]),
        (["--r", "1.5"], ["--r", "'1.5'"]),
        (["--r", "0"], ["r=0", "1 or more"]),
        (["--lr_scheduler_type", "cosin"], ["lr_scheduler_type", "'cosin'", "'cosine'"]),
        (["--bf16", "perhaps"], ["bf16", "perhaps"]),
        (["--target_modules"], ["target_modules", "expected at least one argument"]),
        (["--method", "sltrain", "--sparsity", "2"], ["sparsity=2.0"]),
        (["--proj_type", "sideways"], ["sideways"]),
        (["--sequence_length", "1"], ["sequence_length 1", "2 or more"]),
        (["--metrics_every", "0"], ["--metrics_every 0", "1 or more"]),
        (["--total_batch_size", "-16"], ["--total_batch_size -16", "1 or more"]),
        (["--cpu_threads", "0"], ["--cpu_threads 0"]),
    ],
)
def test_a_bad_flag_is_named_with_the_way_out(argv, parts):
    message = refusal(*argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning_rate", "nan"),
        ("--learning_rate", "-1"),
        ("--learning_rate", "inf"),
        ("--weight_decay", "-0.1"),
        ("--max_grad_norm", "nan"),
        ("--warmup_steps", "nan"),
        ("--warmup_steps", "-1"),
        ("--adam_beta1", "1"),
        ("--adam_beta2", "-0.5"),
        ("--max_steps", "0"),
        ("--max_steps", "-5"),
        ("--num_train_epochs", "0"),
        ("--per_device_train_batch_size", "0"),
        ("--per_device_eval_batch_size", "0"),
        ("--gradient_accumulation_steps", "0"),
    ],
)
def test_numbers_that_training_could_not_take_are_refused_at_once(flag, value):
    message = refusal(flag, value)
    assert flag.removeprefix("--") in message
    assert str(float(value)) in message or value in message


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_rate_for_what_is_no_target(method, yaml_file):
    assert parse("--method", method).method.other_lr_scale == 1
    assert parse("--method", method, "--other_lr_scale", "0.25").method.other_lr_scale == 0.25
    assert parse(yaml_file(f"method: {method}\nother_lr_scale: 4\n")).method.other_lr_scale == 4
    assert "other_lr_scale=0.0" in refusal("--method", method, "--other_lr_scale", "0")


def test_a_rate_of_zero_is_taken():
    assert parse("--learning_rate", "0").training.learning_rate == 0


@pytest.mark.parametrize("flag", ["--learning", "--max_s", "--meth", "--target"])
def test_abbreviations_are_refused(flag):
    # an abbreviation would change its meaning with the next version of TrainingArguments
    assert f"unknown flag '{flag}'" in refusal(flag, "1")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rte: 1e-2\n", ["unknown key 'learning_rte'", "did you mean 'learning_rate'?"]),
        ("method: galor\n", ["unknown method 'galor'", "did you mean 'galore'?"]),
        ("method: [galore]\n", ["unknown method"]),
        ("method:\n", ["unknown method"]),
        ("method: galore\nsparsity: 0.1\n", ["unknown key 'sparsity'", "a setting of sltrain, not of galore"]),
        ("help: 1\n", ["unknown key 'help'"]),
        ("max_steps: abc\n", ["max_steps", "'abc'"]),
        ("max_steps: 1.5\n", ["max_steps", "'1.5'"]),
        ("max_steps:\n", ["max_steps", "no value"]),
        ("metrics:\n", ["metrics", "no value"]),
        ("learning_rate: [1]\n", ["learning_rate: [1] is no single value"]),
        ("learning_rate: {a: 1}\n", ["learning_rate: {'a': 1} is no single value"]),
        ("dataset_path: [a, b]\n", ["dataset_path: ['a', 'b'] is no single value"]),
        ("target_modules: {a: 1}\n", ["target_modules: {'a': 1} is no single value"]),
        ("target_modules: [[a]]\n", ["target_modules: [['a']] is no single value"]),
        ("bf16: perhaps\n", ["bf16", "perhaps"]),
        ("metrics: [3]\n", ["--metrics 3"]),
        ("- a\n- b\n", ["a recipe is a mapping"]),
        ("only words\n", ["a recipe is a mapping"]),
        ("3: 4\n", ["a recipe is a mapping"]),
        ("a: [1\n", ["is no valid YAML"]),
        ("a: b: c\n", ["is no valid YAML"]),
        (b"\x00\xff\xfe\x01", ["is no valid YAML"]),
        (b"a: \x01\n", ["is no valid YAML"]),
    ],
)
def test_a_bad_yaml_file_is_refused_in_one_line(text, parts, yaml_file):
    message = refusal(yaml_file(text))
    for part in parts:
        assert part in message


def test_an_error_in_a_yaml_file_names_the_file(yaml_file):
    for text in ("unknown_key: 1\n", "learning_rate: [1]\n", "a: [\n", "words\n"):
        path = yaml_file(text)
        assert str(path) in refusal(path)


def test_umlauts_in_yaml_do_not_depend_on_the_locale(yaml_file):
    assert parse(yaml_file("run_name: Übung\n")).training.run_name == "Übung"


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_yaml_file_and_a_folder_are_refused(name, tmp_path):
    message = refusal(tmp_path / name)
    assert "there is no such file" in message
    assert str(tmp_path) in message


def test_another_methods_yaml_file_with_a_method_flag_is_refused():
    # the file's numbers were chosen for its own method
    message = refusal(CONFIGS / "60m" / "galore.yaml", "--method", "sltrain")
    assert "a setting of apollo, galore, not of sltrain" in message


def test_fail_writes_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        fail(ValueError("two\n  lines"))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: two lines\n")
    with pytest.raises(SystemExit) as caught:
        fail(ValueError("of another process"), main_process=False)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


# ---- the command that goes into the report ----


@pytest.mark.parametrize(
    "hidden",
    [
        ["--hub_token", "hf_secret"],
        ["--hub_token=hf_secret"],
        ["--hub-token", "hf_secret"],
        ["--output_dir", "/home/me/hf_secret"],
        ["--output_dir=/home/me/hf_secret"],
        ["--resume_from_checkpoint", "/home/me/hf_secret/checkpoint-1"],
        ["--overwrite"],
        ["--overwrite", "true"],
    ],
)
def test_the_reported_command_holds_no_secret_and_no_place(hidden):
    kept = ["--max_steps", "3", "--target_modules", "q_proj", "k_proj", "--scale=0.5"]
    for argv in ([*hidden, *kept], [*kept[:2], *hidden, *kept[2:]], [*kept, *hidden]):
        assert parse(*argv).command == kept


@pytest.mark.parametrize("hidden", [["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_a_token_on_the_command_line_is_warned_of(hidden, caplog):
    parse(*hidden)
    assert "everybody on this machine" in caplog.text
    assert "hf_secret" not in caplog.text


def test_an_error_never_shows_a_token(capsys):
    secret = "hf_" + "a1B2" * 9
    with pytest.raises(ValueError, match="unknown flag") as caught:
        parse(f"--hub_tokn={secret}")
    with pytest.raises(SystemExit):
        fail(caught.value)
    said = capsys.readouterr().err
    assert "--hub_tokn=<token>" in said
    assert secret not in said


def test_the_reported_command_names_the_yaml_file_as_typed(yaml_file):
    path = yaml_file("max_steps: 3\n")
    assert parse(path, "--seed", "1").command == [str(path), "--seed", "1"]


# ---- the YAML files ----

# the study: hidden, MLP, heads, layers
STUDY_SIZES = {
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
}
# the study: steps, warm-up, steps between checkpoints (the study names none for 1B)
STUDY_SCHEDULES = {
    "60m": (10_000, 1_000, 1_000),
    "130m": (20_000, 2_000, 2_000),
    "350m": (60_000, 6_000, 6_000),
    "1b": (20_000, 2_000, None),
}
# the study: learning rate, then the method's own settings
STUDY_SETTINGS = {
    ("60m", "fullrank"): (1e-3, {}),
    ("130m", "fullrank"): (1e-3, {}),
    ("350m", "fullrank"): (1e-3, {}),
    ("1b", "fullrank"): (4e-4, {}),
    ("60m", "galore"): (1e-2, {"r": 128, "scale": 0.25, "update_proj_gap": 200, "proj_type": "std"}),
    ("130m", "galore"): (1e-2, {"r": 256, "scale": 0.25, "update_proj_gap": 200, "proj_type": "std"}),
    ("350m", "galore"): (1e-2, {"r": 256, "scale": 0.25, "update_proj_gap": 200, "proj_type": "std"}),
    ("1b", "galore"): (1e-2, {"r": 512, "scale": 0.25, "update_proj_gap": 200, "proj_type": "std"}),
    ("60m", "fira"): (1e-2, {"r": 128, "alpha": 0.25, "update_proj_gap": 200, "proj_type": "std"}),
    ("130m", "fira"): (1e-2, {"r": 256, "alpha": 0.25, "update_proj_gap": 200, "proj_type": "std"}),
    ("350m", "fira"): (1e-2, {"r": 256, "alpha": 0.25, "update_proj_gap": 200, "proj_type": "std"}),
    ("60m", "relora"): (
        1e-3,
        {"r": 128, "alpha": 32, "dropout": 0.1, "reset_every": 1000, "restart_warmup_steps": 100},
    ),
    ("130m", "relora"): (
        1e-3,
        {"r": 256, "alpha": 32, "dropout": 0.1, "reset_every": 5000, "restart_warmup_steps": 100},
    ),
    ("350m", "relora"): (
        5e-4,
        {"r": 256, "alpha": 32, "dropout": 0.1, "reset_every": 5000, "restart_warmup_steps": 200},
    ),
    ("60m", "cola"): (6e-3, {"r": 128, "only_lr_act": False, "activation": "silu", "recompute": False}),
    ("130m", "cola"): (3e-3, {"r": 256, "only_lr_act": False, "activation": "silu", "recompute": False}),
    ("350m", "cola"): (3e-3, {"r": 256, "only_lr_act": True, "activation": "silu", "recompute": False}),
    ("1b", "cola"): (2e-3, {"r": 512, "only_lr_act": True, "activation": "silu", "recompute": False}),
    ("60m", "sltrain"): (2e-3, {"r": 128, "alpha": 32.0, "sparsity": 0.03}),
    ("130m", "sltrain"): (3e-3, {"r": 256, "alpha": 16.0, "sparsity": 0.03}),
    ("350m", "sltrain"): (2e-3, {"r": 256, "alpha": 16.0, "sparsity": 0.03}),
    ("1b", "sltrain"): (3e-3, {"r": 256, "alpha": 8.0, "sparsity": 0.03}),
}


@pytest.mark.parametrize(("size", "method"), STUDY_SETTINGS)
def test_a_yaml_file_has_the_studys_numbers(size, method):
    recipe = parse(CONFIGS / size / f"{method}.yaml", "--use_cpu")
    args, data = recipe.training, recipe.data
    rate, settings = STUDY_SETTINGS[size, method]
    steps, warmup, save_steps = STUDY_SCHEDULES[size]
    assert recipe.method.method == method
    assert recipe.recipe.model_size == size
    assert args.learning_rate == pytest.approx(rate)
    assert {key: getattr(recipe.method, key) for key in settings} == settings
    assert recipe.method.target_modules is None
    assert (args.max_steps, args.warmup_steps) == (steps, warmup)
    if save_steps is not None:
        assert args.save_steps == save_steps
    assert recipe.recipe.total_batch_size == 512
    assert 512 % args.per_device_train_batch_size == 0
    clipping = {"cola": 0.5, "relora": 0.0 if size == "350m" else 1.0}.get(method, 0.0)
    assert (args.weight_decay, args.max_grad_norm) == (0.01 if method == "cola" else 0.0, clipping)
    assert args.optim in ("adamw_torch", "adamw_torch_fused")  # Trainer takes the second where torch has it
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.999)
    assert args.lr_scheduler_type == "cosine_with_min_lr"
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert args.bf16
    assert (data.dataset_name, data.dataset_config_name, data.streaming) == ("allenai/c4", "en", True)
    assert data.tokenizer_name == "google-t5/t5-base"
    assert data.sequence_length == 256


@pytest.mark.parametrize("size", STUDY_SIZES)
def test_a_model_has_the_studys_shape(size):
    config = model_config(size, vocabulary=32_000, sequence_length=256, eos_token_id=1)
    shape = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers
    assert shape == STUDY_SIZES[size]
    assert config.vocab_size == 32_000
    assert (config.rms_norm_eps, config.initializer_range, config.tie_word_embeddings) == (1e-6, 0.02, False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_every_method_has_a_yaml_file_in_every_size(size, name):
    path = CONFIGS / size / f"{name}.yaml"
    assert path.is_file(), f"{path} is missing: CONTRIBUTING.md says what a new method needs"
    recipe = parse(path, "--use_cpu")
    assert (recipe.method.method, recipe.recipe.model_size) == (VARIANTS.get(name, name), size)
    config = model_config(size, vocabulary=512, sequence_length=recipe.data.sequence_length, eos_token_id=0)
    assert getattr(recipe.method, "r", 1) <= min(config.hidden_size, config.intermediate_size)


def test_there_is_no_yaml_file_that_nothing_reads():
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.is_file()}
    assert found == {f"{size}/{name}.yaml" for size in SIZES for name in (*METHODS, *VARIANTS)}
