import dataclasses
import re

import pytest
from argument_checks import PRESET, refusal

from vqbeam import configs
from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.cli.parser import ELSEWHERE, Parser, UsageError, add_config
from vqbeam.pipelines.cli.stage_commands import STAGES, add_log
from vqbeam.pipelines.paths import is_dataflow, with_absolute_paths

FIELDS = list(configs.field_types())
PIPELINE_VERBS = ["run", *STAGES[:-1]]


@pytest.fixture
def parse_run(preset):
    return lambda *words: parse(["run", preset, "--run-dir", "d", *words])[1]


def value_for(field, kind):
    """Returns another value of a field than its default, within its range."""
    limits = field.metadata
    if limits.get("choices"):
        return limits["choices"][-1]
    if kind is str:
        return "glyphs"
    low, high = limits.get("minimum") or 0, limits.get("maximum")
    return kind(low) if high is None else kind(min(high, low + 4))


@pytest.mark.parametrize("verb", PIPELINE_VERBS)
def test_pipeline_verbs(verb, preset):
    name, arguments = parse([verb, preset, "--run-dir", "runs/x"])
    assert name == verb
    assert arguments == {
        "config": configs.load_preset(preset),
        "run_dir": "runs/x",
        "stages": STAGES if verb == "run" else (verb,),
        "beam_args": ["--runner=FnApiRunner"],
        "retrain": [],
        "minutes": None,
        "extend": False,
    }


def test_models_to_start_from(parse_run, preset):
    config = parse_run("--init-from", "runs/a")["config"]
    assert config.vqvae.init_from == config.prior.init_from == "runs/a"
    config = parse_run("--init-from", "runs/a", "--prior.init-from", "runs/b")["config"]
    assert (config.vqvae.init_from, config.prior.init_from) == ("runs/a", "runs/b")
    config = parse_run("--vqvae.init-from", "runs/a")["config"]
    assert (config.vqvae.init_from, config.prior.init_from) == ("runs/a", None)


def test_models_to_extend(parse_run, preset):
    assert parse_run("--vqvae.steps", "200", "--extend")["extend"] is True
    with pytest.raises(UsageError, match="--minutes and --extend exclude each other"):
        parse_run("--extend", "--minutes", "3")
    with pytest.raises(UsageError, match="unknown flag --extend"):
        parse(["encode", preset, "--run-dir", "runs/x", "--extend"])


def test_models_to_train_again(parse_run, preset):
    words = ["--retrain", "train-vqvae", "--retrain", "train-prior"]
    assert parse_run(*words)["retrain"] == ["train-vqvae", "train-prior"]
    with pytest.raises(UsageError, match="--retrain: .*'encode'"):
        parse_run("--retrain", "encode")
    # Not by a stage that would delete the model and not train it.
    for verb, message in (
        ("prepare", "unknown flag --retrain; it belongs to vqbeam run and to the stage"),
        ("train-prior", "'train-vqvae'"),
    ):
        with pytest.raises(UsageError, match=message):
            parse([verb, preset, "--run-dir", "runs/x", "--retrain", "train-vqvae"])


def test_minutes_are_for_all_stages(parse_run, preset):
    assert parse_run("--minutes", "1.5")["minutes"] == 1.5
    with pytest.raises(UsageError, match="--minutes: 0 is not above 0"):
        parse_run("--minutes", "0")
    with pytest.raises(UsageError, match="unknown flag --minutes"):
        parse(["train-prior", preset, "--run-dir", "runs/x", "--minutes", "3"])


def test_flags_may_stand_before_the_preset(preset):
    words = ["run", "--runner", "FnApiRunner", "--seed=3", "--run-dir=d", preset]
    given = parse(words)[1]
    assert given["config"].seed == 3
    assert given["beam_args"] == ["--runner=FnApiRunner"]


@pytest.mark.parametrize("separator", ["-", "_"])
@pytest.mark.parametrize("name,field,kind", FIELDS, ids=[name for name, _, _ in FIELDS])
def test_every_config_field_is_a_flag(name, field, kind, separator):
    parser = Parser("run", "")
    fields = add_config(parser, configs.SECTIONS) | add_log(parser)
    value = value_for(field, kind)
    given = parser.parse_words([f"--{name.replace('_', separator)}", str(value)])
    assert given[fields[name]] == value
    assert type(given[fields[name]]) is kind


def test_overrides_reach_the_config(parse_run):
    config = parse_run(
        "--seed", "7", "--vqvae.num-codes=64", "--vqvae.learning_rate", "1e-2", "--data.fit", "pad"
    )["config"]
    assert config.seed == 7
    assert config.vqvae.num_codes == 64
    assert config.vqvae.learning_rate == 0.01
    assert config.data.fit == "pad"


def test_none_unsets_an_optional_field(tmp_path, preset):
    path = tmp_path / "limited.py"
    path.write_text(
        PRESET.replace('source="glyphs"', 'source="glyphs", max_images=5, data_dir="x"')
    )
    words = ["run", str(path), "--run-dir", "d"]
    assert parse(words)[1]["config"].data.max_images == 5
    words += ["--data.max-images", "none", "--data.data-dir", "none"]
    data = parse(words)[1]["config"].data
    assert data.max_images is None and data.data_dir is None
    assert "'none' is not an integer" in refusal(*words, "--data.height", "none")


def test_smoke_comes_before_explicit_flags(parse_run, preset):
    smoke = parse_run("--smoke")["config"]
    assert smoke == configs.smoke(configs.load_preset(preset))
    mixed = parse_run("--vqvae.steps", "8", "--smoke")["config"]
    assert mixed == configs.override(smoke, {"vqvae.steps": 8})


@pytest.mark.parametrize("name", configs.preset_names())
def test_built_in_presets(name):
    given = parse(["run", name, "--run-dir", "d", "--smoke"])[1]
    config = configs.smoke(configs.load_preset(name))
    assert given["config"] == dataclasses.replace(config, data=with_absolute_paths(config.data))


@pytest.mark.parametrize(
    "words,message",
    [
        (["--vqvae.num-codes", "1"], "--vqvae.num-codes is 1; it must be at least 2"),
        (["--vqvae.num_codes", "-1"], "--vqvae.num-codes is -1; it must be at least 2"),
        (["--prior.dropout", "2"], "--prior.dropout is 2.0; it must be at most 0.9"),
        (["--data.fit", "x"], "--data.fit is 'x'; choose one of crop, pad"),
        (["--data.height", "30"], "--data.height is 30, which --vqvae.downsampling (4) does not"),
    ],
)
def test_values_out_of_range_name_the_flag(parse_run, words, message):
    with pytest.raises(configs.VqbeamError) as caught:
        parse_run(*words)
    assert str(caught.value).startswith(message)


def test_unknown_preset():
    with pytest.raises(configs.VqbeamError, match="no preset is named 'nothing-like-it'"):
        parse(["run", "nothing-like-it", "--run-dir", "d"])


@pytest.mark.parametrize(
    "words,passed",
    [
        (["--runner=DirectRunner"], ["--runner=DirectRunner"]),
        (["--runner", "dataflow"], ["--runner=dataflow"]),
        (["--streaming"], ["--runner=FnApiRunner", "--streaming"]),
        (
            ["--experiments", "a", "--experiments=b=c,d", "--experiment", "e"],
            ["--runner=FnApiRunner", "--experiments=a", "--experiments=b=c,d", "--experiment=e"],
        ),
        (
            ["--project", "p", "--region=r", "--temp_location", "gs://b/t"],
            ["--runner=FnApiRunner", "--project=p", "--region=r", "--temp_location=gs://b/t"],
        ),
        (["--direct-num-workers", "4"], ["--runner=FnApiRunner", "--direct_num_workers=4"]),
        (["--label", "a=b"], ["--runner=FnApiRunner", "--label=a=b"]),
        (
            ["--sdk_harness_log_level_overrides", '{"a": "INFO"}'],
            ["--runner=FnApiRunner", '--sdk_harness_log_level_overrides={"a": "INFO"}'],
        ),
        (
            ["--update_compatibility_version", "--s3_disable_ssl"],
            ["--runner=FnApiRunner", "--update_compatibility_version", "--s3_disable_ssl"],
        ),
    ],
)
def test_beam_options_are_passed_on(parse_run, words, passed):
    assert parse_run(*words)["beam_args"] == passed


def test_beam_understands_what_is_passed_on(parse_run):
    from apache_beam.options.pipeline_options import PipelineOptions

    passed = parse_run(
        "--experiments", "a", "--direct_num_workers", "2", "--streaming", "--project", "p"
    )["beam_args"]
    options = PipelineOptions(passed).get_all_options(drop_default=True)
    assert options["experiments"] == ["a"]
    assert options["direct_num_workers"] == 2
    assert options["streaming"] is True
    assert options["project"] == "p"
    assert options["runner"] == "FnApiRunner"


def test_a_runner_may_be_a_class_path(parse_run):
    path = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    assert parse_run("--runner", path)["beam_args"] == [f"--runner={path}"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--runer=DataflowRunner"], "vqbeam: unknown flag --runer; did you mean --runner?"),
        (["--run", "FnApiRunner"], "vqbeam: unknown flag --run; did you mean --runner?"),
        (["--project_dir", "p"], "vqbeam: unknown flag --project_dir; did you mean --project?"),
        (["--num-codes", "3"], "vqbeam: unknown flag --num-codes; did you mean --vqvae.num-codes?"),
        (
            ["--steps=3"],
            "vqbeam: unknown flag --steps; did you mean --vqvae.steps or --prior.steps?",
        ),
        (["--vqvae.num-code=3"], "vqbeam: unknown flag --vqvae.num-code; did you mean"),
        (["--zzzzqqqq"], "vqbeam: unknown flag --zzzzqqqq; see vqbeam run --help"),
        (["-x"], "vqbeam: unknown flag -x; see vqbeam run --help"),
    ],
)
def test_unknown_flags(preset, words, message):
    assert refusal("run", preset, "--run-dir", "d", *words).startswith(message)


def test_an_unknown_flag_is_named_before_anything_else_is_missed():
    assert "unknown flag --rundir; did you mean --run-dir?" in refusal("run", "--rundir", "d")


@pytest.mark.parametrize(
    "words,message",
    [
        (["--runner=dataflw"], "--runner: there is no runner 'dataflw'; did you mean Dataflow"),
        (["--runner=nope"], "--runner: there is no runner 'nope'; use FnApiRunner"),
        (["--runner=no.such.Runner"], "--runner: 'no.such.Runner' does not load: No module named"),
        (["--runner=os.path.Runner"], "--runner: 'os.path.Runner' does not load: "),
        (["--runner=DaskRunner"], "--runner: Beam's DaskRunner silently drops data"),
        (["--runner=apache_beam.runners.dask.dask_runner.DaskRunner"], "--runner: Beam's Dask"),
        (["--runner"], "--runner: needs a value"),
        (["--direct_num_workers=a"], "--direct_num_workers: Beam does not take 'a' here"),
        (["--direct_running_mode=a"], "--direct_running_mode: invalid choice: 'a' (choose from"),
        (["--vqvae.num-codes", "abc"], "--vqvae.num-codes: 'abc' is not an integer"),
        (["--vqvae.num-codes", "1.5"], "--vqvae.num-codes: '1.5' is not an integer"),
        (["--vqvae.num-codes"], "--vqvae.num-codes: needs a value"),
        (["--vqvae.learning-rate", "fast"], "--vqvae.learning-rate: 'fast' is not a number"),
        (["--vqvae.learning-rate", "nan"], "--vqvae.learning-rate: 'nan' is not a number"),
        (["--data.image-key", ""], "--data.image-key: is empty"),
        (["--smoke=1"], "--smoke: takes no value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--run-dir=hdfs://a/b"], "--run-dir: 'hdfs://a/b' cannot be used; paths are those of"),
        (["--no_wait_until_finish"], "--no_wait_until_finish: vqbeam waits for the job, to report"),
        (["--template_location=gs://b/t"], "--template_location: vqbeam starts the job itself"),
    ],
)
def test_malformed_command_lines(preset, words, message):
    line = refusal("run", preset, "--run-dir", "d", *words)
    assert line.startswith(f"vqbeam run: {message}")
    assert line.endswith("(see vqbeam run --help)")


def shown_by(capsys, *words):
    with pytest.raises(SystemExit) as end:
        parse(["run", *words])
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_each_field_with_its_text_and_range(capsys):
    shown = shown_by(capsys, "--help", "all")
    for name, field, _ in FIELDS:
        assert f"--{name.replace('_', '-')} " in shown
        assert field.metadata.get("help", "") in shown
    assert "codebook size K, of each level (2 to 1,048,576)" in shown
    assert "--data.fit {crop,pad}" in shown


def test_help_is_short_and_by_section(capsys):
    short = shown_by(capsys, "-h")
    assert "--vqvae.num-codes N" in short and "--vqvae.clip-norm" not in short
    assert "run --help data|vqvae|encode|prior|sample|all" in short
    section = shown_by(capsys, "--help", "vqvae")
    assert "--vqvae.clip-norm X" in section and "--prior.steps" not in section


def test_help_has_the_defaults_of_a_preset(capsys):
    shown = shown_by(capsys, "glyphs", "--help", "vqvae")
    codes = configs.load_preset("glyphs").vqvae.num_codes
    assert f"codebook size K, of each level (2 to 1,048,576; default {codes})" in shown


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "--epochs", "3"], "did you mean --vqvae.steps or --prior.steps?"),
        (["run", "--resume"], "the same command goes on where it stopped"),
        (["sample", "DIR", "--resume"], "see vqbeam sample --help"),
        (["sample", "DIR", "--cfg", "2"], "did you mean --guidance?"),
    ],
)
def test_words_of_other_programs(words, hint):
    with pytest.raises(UsageError, match=re.escape(hint)):
        parse(words)


def test_words_of_other_programs_lead_to_flags_that_exist():
    known = {"--" + name.replace("_", "-") for name, *_ in FIELDS}
    known |= {"--label", "--output", "--num", "--guidance", "--temperature", "--batch-size"}
    flags = {flag for here in ELSEWHERE.values() if here.startswith("--") for flag in here.split()}
    assert flags - known == {"--run-dir", "--retrain", "--direct_num_workers"}


def test_a_folder_of_images_is_named_from_the_root(parse_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    whole = {
        "photos": f"{tmp_path}/photos",
        "../photos/": f"{tmp_path.parent}/photos",
        "~/photos": "/home/me/photos",
        "/a/b": "/a/b",
        "gs://bucket/photos": "gs://bucket/photos",
    }
    for given, path in whole.items():
        assert parse_run(f"--data.source=folder:{given}")["config"].data.source == f"folder:{path}"
    assert parse_run("--data.source=tfds:mnist")["config"].data.source == "tfds:mnist"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--runner=DataflowRunner"], True),
        (["--runner=dataflow", "--project=p"], True),
        (["--dataflow_endpoint=localhost"], False),
        (["--runner=DataflowRunner", "--runner=FnApiRunner"], False),
    ],
)
def test_whether_dataflow_is_asked_for(words, expected):
    assert is_dataflow(words) is expected


def test_the_levels_of_fsq_say_how_many_codes_there_are(parse_run):
    given = parse_run("--vqvae.quantizer=fsq", "--vqvae.fsq-levels=8,5,5")["config"].vqvae
    assert (given.num_codes, given.fsq_sizes) == (200, (8, 5, 5))
    given = parse_run("--smoke", "--vqvae.quantizer=fsq", "--vqvae.fsq-levels=8,8,8")["config"]
    assert given.vqvae.num_codes == 512
    wrong = ["--vqvae.quantizer=fsq", "--vqvae.fsq-levels=8,5,5", "--vqvae.num-codes=100"]
    with pytest.raises(configs.VqbeamError, match="--vqvae.fsq-levels 8,5,5 make 200 codes, --vqv"):
        parse_run(*wrong)
    with pytest.raises(configs.VqbeamError, match="-levels is for fsq; add --vqvae.quantizer fsq"):
        parse_run("--vqvae.fsq-levels=8,5,5")
    with pytest.raises(
        configs.VqbeamError, match="--vqvae.fsq-levels is '8;5'; give integers from"
    ):
        parse_run("--vqvae.quantizer=fsq", "--vqvae.fsq-levels=8;5")
