"""The command line as scripts see it: exit codes, stdout, stderr, options on either side of a command."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from edgekd import __version__
from edgekd.cli import app
from edgekd.errors import ExportError, UserError
from edgekd.recipe_file import dump_recipe, load_recipe, write_recipe
from edgekd.training.train import RunResult

ROOT = Path(__file__).resolve().parent.parent


def edgekd(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: object, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after `code`."""
    source = f"{code}\nfrom edgekd.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "scenes"
    assert edgekd("data", "make", "--out", out, "--train", 4, "--val", 2, "--quiet").exit_code == 0
    return out


@pytest.fixture
def recipe(tmp_path: Path, scenes: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: tiny\ndata: {{root: {scenes}}}\nstudent: {{model: mobilenetv2-ssd-lite}}\n", encoding="utf-8"
    )
    return path


def test_version() -> None:
    assert edgekd("--version").output == f"edgekd {__version__}\n"


@pytest.mark.parametrize("arguments", [["no-such-command"], ["train"], ["data", "make", "--train", "x"], ["--nope"]])
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    result = edgekd(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    for words in (["--json", *arguments], [*arguments, "--json"]):
        told = json.loads(edgekd(*words).stdout)["error"]
        assert (told["kind"], told["exit_code"]) == ("UsageError", 2)
        assert told["message"]


@pytest.mark.parametrize("words", ["run {} --out {}", "compare {} --out {} --jobs 2 --only 0/2"])
def test_what_is_refused_first_is_json_too(recipe: Path, words: str) -> None:
    result = edgekd(*words.format(recipe, recipe.parent).split(), "--json")
    assert json.loads(result.stdout)["error"]["exit_code"] == result.exit_code == 2


def test_make_and_check(scenes: Path, tmp_path: Path) -> None:
    again = edgekd("--json", "data", "make", "--out", scenes, "--train", 4, "--val", 2)
    made = json.loads(again.stdout)
    assert made["images"] == {"train": 4, "val": 2}
    assert made["synthetic"] is True
    sheet = tmp_path / "sheet.png"
    result = edgekd("data", "check", scenes, "--json", "--sheet", sheet)
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["ok"] else 2)
    assert sheet.is_file()
    assert report["contact_sheet"] == str(sheet)


@pytest.mark.parametrize("name", ["script.py", "image"])
def test_a_contact_sheet_replaces_no_file_of_another_kind(scenes: Path, tmp_path: Path, name: str) -> None:
    taken = next(scenes.rglob("*.png")) if name == "image" else tmp_path / name
    if name != "image":
        taken.write_text("mine")
    before = taken.read_bytes()
    result = edgekd("data", "check", scenes, "--sheet", taken)
    assert result.exit_code == 2
    assert ("is an image of the data set" if name == "image" else "of another kind") in result.stderr
    assert taken.read_bytes() == before


def test_a_sheet_is_drawn_again_though_another_split_is_broken(tmp_path: Path) -> None:
    from edgekd.data.scenes import make_scenes

    root = make_scenes(tmp_path / "scenes", counts={"train": 3, "val": 1})
    (root / "Annotations" / next((root / "ImageSets" / "Main" / "val.txt").open()).strip()).with_suffix(
        ".xml"
    ).write_text("no")
    for _ in range(2):
        result = edgekd("data", "check", root, "--sheet", root / "sheet.png")
        assert "contact sheet: " in result.stdout
        assert "no contact sheet" not in result.stderr


def test_linking_without_a_new_set_is_refused(scenes: Path) -> None:
    result = edgekd("data", "split", scenes, "--link")
    assert result.exit_code == 2
    assert "--link does nothing here" in result.stderr


@pytest.mark.parametrize("command", ["train", "distill", "run"])
def test_a_recipe_of_the_users_own_is_not_replaced_by_the_runs(recipe: Path, command: str) -> None:
    before = recipe.read_text()
    result = edgekd(command, recipe, "--out", recipe.parent)
    assert result.exit_code == 2
    assert "is a file of yours" in result.stderr
    assert recipe.read_text() == before


def test_a_run_s_recipe_may_be_replaced(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    checked = load_recipe(recipe)
    earlier = dump_recipe(checked, out).replace("  box_voting: null\n", "")  # before it had a first line, and this key
    (out / "recipe.yaml").write_text(earlier)
    write_recipe(checked, out)
    write_recipe(checked.model_copy(update={"seed": 5}), out)
    assert load_recipe(out / "recipe.yaml").seed == 5


def test_check_exits_2_on_a_bad_set(tmp_path: Path) -> None:
    from edgekd.data.scenes import make_scenes

    root = make_scenes(tmp_path / "scenes", counts={"train": 3, "val": 1})
    image = next(path for path in root.rglob("*.png"))
    image.write_bytes(b"no image")
    result = edgekd("data", "check", root)
    assert result.exit_code == 2
    assert image.name in result.output


def test_convert_there_and_back(scenes: Path, tmp_path: Path) -> None:
    assert edgekd("data", "convert", scenes, "--to", "coco", "--out", tmp_path / "coco").exit_code == 0
    result = edgekd("data", "convert", tmp_path / "coco", "--to", "yolo", "--out", tmp_path / "yolo", "--json")
    assert json.loads(result.stdout)["images"] == {"train": 4, "val": 2}
    assert edgekd("data", "convert", scenes, "--to", "xml", "--out", tmp_path / "x").exit_code == 2


def test_seed_may_stand_before_or_after(tmp_path: Path) -> None:
    pixels = []
    for index, words in enumerate((["--seed", "7", "data", "make"], ["data", "make", "--seed", "7"], ["data", "make"])):
        out = tmp_path / str(index)
        assert edgekd(*words, "--out", out, "--train", 1, "--val", 0).exit_code == 0
        pixels.append(next(out.rglob("*.png")).read_bytes())
    assert pixels[0] == pixels[1] != pixels[2]


def test_recipe_check_of_several_says_of_each(recipe: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(recipe.read_text() + "\nnosuch: 1\n")
    both = edgekd("recipe", "check", recipe, wrong, "--no-files")
    assert both.exit_code == 2
    assert both.stdout == f"{recipe}: ok\n"
    assert "nosuch: unknown key" in both.stderr
    told = json.loads(edgekd("recipe", "check", wrong, recipe, "--no-files", "--json").stdout)
    assert told["recipes"][str(wrong)] is None
    assert told["recipes"][str(recipe)]["name"]
    assert len(told["problems"]) == 1
    gone = edgekd("recipe", "check", recipe, tmp_path / "gone.yaml", "--no-files", "--json")
    assert "there is no recipe" in json.loads(gone.stdout)["problems"][0]
    assert edgekd("recipe", "check", recipe, recipe, "--no-files").exit_code == 0


def test_a_wrong_key_on_the_command_line_is_told_there(recipe: Path) -> None:
    result = edgekd("train", recipe, "--out", "x", "--set", "nosuch.key=1")
    assert "--set nosuch.key=1: nosuch: unknown key" in result.stderr


def test_recipe_check(recipe: Path) -> None:
    assert "epochs:" in edgekd("recipe", "check", recipe).output
    shown = json.loads(edgekd("recipe", "check", recipe, "--set", "train.epochs=3", "--no-files", "--json").stdout)
    assert shown["train"]["epochs"] == 3
    assert edgekd("recipe", "check", recipe, "--set", "data.root=no").exit_code == 2
    assert edgekd("recipe", "check", recipe, "--set", "data.root=no", "--no-files").exit_code == 0


def test_run_needs_teachers(recipe: Path) -> None:
    result = edgekd("run", recipe, "--out", "x")
    assert result.exit_code == 2
    assert "needs at least one teacher" in result.stderr


def test_a_recipe_with_mistakes_exits_2_and_lists_them(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "epochs: 3\n", encoding="utf-8")
    result = edgekd("train", recipe, "--out", "x", "--set", "train.lr=-1")
    assert result.exit_code == 2
    assert f"{recipe}:4:1: epochs: unknown key" in result.stderr
    assert "--set train.lr=-1: train.lr: got -1" in result.stderr
    assert "Traceback" not in result.output
    as_json = edgekd("--json", "train", recipe, "--out", "x")
    body = json.loads(as_json.stdout)["error"]
    assert body["kind"] == "RecipeError"
    assert len(body["problems"]) == 1


def test_what_train_is_told(monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {}

    def fake(work: Any, out: Path) -> RunResult:
        told.update(seed=work.recipe.seed, device=work.device, quiet=work.terminal.quiet, lr=work.recipe.train.lr)
        return RunResult(out, out / "model.pt", {"ap50": 0.5})

    monkeypatch.setattr("edgekd.stages.train_student", fake)
    words = [
        "--seed",
        3,
        "--set",
        "train.lr=0.5",
        "train",
        recipe,
        "--out",
        tmp_path / "o",
        "--device",
        "cpu",
        "-q",
        "--json",
    ]
    result = edgekd(*words)
    assert told == {"seed": 3, "device": "cpu", "quiet": True, "lr": 0.5}
    assert json.loads(result.stdout)["metrics"] == {"ap50": 0.5}


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0"])
def test_unknown_devices_are_refused(recipe: Path, name: str) -> None:
    result = edgekd("train", recipe, "--out", "x", "--device", name)
    assert result.exit_code == 2
    assert "auto, cpu, cuda or cuda:N" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ExportError("the exporter failed", got="x"), 1, "error: the exporter failed\n  got:      x"),
        (KeyboardInterrupt(), 130, "the same command goes on from there"),
        (ZeroDivisionError("a bug"), 1, "internal error: ZeroDivisionError: a bug"),
        (OSError(28, "No space left on device", "/x/y"), 1, "error: /x/y: No space left on device\n  fix:      free"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied\n  fix:      choose"),
    ],
)
def test_how_errors_end(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path, error: BaseException, code: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("edgekd.stages.train_student", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = edgekd("train", recipe, "--out", tmp_path / "o")
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert ("traceback" in result.stderr) is ("internal" in words)
    if "internal" in words:
        kept = Path(result.stderr.split("traceback: ")[1].strip())
        assert "ZeroDivisionError: a bug" in kept.read_text()
        assert "Traceback" in edgekd("--debug", "train", recipe, "--out", tmp_path / "o").stderr
    body = json.loads(edgekd("train", recipe, "--out", tmp_path / "o", "--json").stdout)
    assert body["error"]["exit_code"] == code


def test_json_is_all_that_stdout_gets(tmp_path: Path) -> None:
    noise = "import os, edgekd.data.scenes as s\nreal = s.make_scenes\n" + (
        "def noisy(*a, **k):\n    print('python noise'); os.write(1, b'library noise\\n'); return real(*a, **k)\n"
        "s.make_scenes = noisy"
    )
    done = process("data", "make", "--out", tmp_path / "s", "--train", 1, "--val", 1, "--json", code=noise)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == {"train": 1, "val": 1}
    assert "python noise" in done.stderr
    assert "library noise" in done.stderr
    assert "scenes: 2/2" in done.stderr


def test_a_terminal_that_lacks_a_sign_gets_another(tmp_path: Path) -> None:
    words = ("data", "make", "--out", tmp_path / "a → b", "--train", 1, "--val", 1)
    done = process(*words, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert r"a \u2192 b: synthetic scenes" in done.stdout


def test_an_error_with_no_place_to_write_to_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("edgekd.stages.train_student", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    result = edgekd("train", recipe, "--out", tmp_path / "o")
    assert result.exit_code == 1
    assert "internal error: ZeroDivisionError: a bug" in result.stderr
    assert "Traceback" in result.stderr, "else it would be lost"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_stdout_is_told() -> None:
    source = "from edgekd.cli import main\nmain()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", source, "recipe", "schema", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_is_held_by_one_process(recipe: Path, tmp_path: Path) -> None:
    from edgekd.workspace import locked

    with locked(tmp_path / "o"):
        done = process("train", recipe, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert f"another edgekd process works in {tmp_path / 'o'}" in done.stderr
    assert str(os.getpid()) in done.stderr
    with locked(tmp_path / "o"):
        pass


def test_a_file_system_without_locks_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.workspace import locked

    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(UserError, match="cannot be held against other processes"), locked(tmp_path / "o"):
        pass


def test_out_must_be_a_folder_that_can_be_made(recipe: Path) -> None:
    result = edgekd("train", recipe, "--out", recipe)
    assert result.exit_code == 2
    assert "is a file" in result.stderr


def test_shell_completion() -> None:
    done = process(_EDGEKD_COMPLETE="complete_bash", COMP_WORDS="edgekd d", COMP_CWORD="1")
    assert set(done.stdout.split()) == {"doctor", "data", "distill"}


def test_doctor_exits_0_where_the_base_works() -> None:
    result = edgekd("doctor", "--json")
    assert json.loads(result.stdout)["ok"] is (result.exit_code == 0)


def test_quantize_wants_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    for source in (tmp_path / "a.onnx", tmp_path / "none"):
        result = edgekd("quantize", source, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "is no run folder" in result.stderr
    assert not (tmp_path / "out").exists()


def test_bench_refuses_what_it_cannot_read(scenes: Path) -> None:
    result = edgekd("bench", "teacher:a=no.onnx", "--data", scenes, "--split", "val")
    assert result.exit_code == 2
    assert "no.onnx" in result.stderr
    assert edgekd("bench", "a.onnx", "--ensemble", "--data", scenes, "--split", "val").exit_code == 2


@pytest.mark.parametrize(
    ("words", "idle", "need"),
    [
        ("bench a.onnx --data d --split val --streams 2", "--streams", "--mode throughput"),
        ("bench a.onnx --data d --split val --mlperf-seconds 2", "--mlperf-seconds", "--mlperf"),
        ("bench a.onnx --data d --split val --realtime", "--realtime", "--video"),
        ("bench a.onnx --data d --split val --precision int8", "--precision", "--target"),
        (
            "bench a.onnx --data d --split val --baseline-files f --summary s.md",
            "--baseline-files, --summary",
            "--baseline",
        ),
        ("bench a.onnx --video v.mp4 --publish --table t.md", "--table, --publish", "--data, and without --video"),
        ("bench a.onnx --video v.mp4 --data d", "--data", "without --video"),
        ("bench a.onnx --video v.mp4 --time-limit 3", "--time-limit", "--target"),
        ("bench a.onnx --target ssh://x --video v.mp4", "--video", "without --target"),
        ("bench a.onnx --target ssh://x --mode throughput", "--mode", "without --target"),
        ("bundle a.onnx --out b --split val", "--split", "--data"),
        ("export run --out a.onnx --split val", "--split", "--data"),
        ("export run --out a.onnx --level 3 --no-library-tactics", "--level, --library-tactics", "--format engine"),
        ("export run --out a.onnx --calibration entropy", "--calibration", "--precision int8"),
        ("export run --out a.onnx --precision fp16 --target tensorrt", "--target", "--precision int8"),
        ("export run --out a.onnx --max-map-drop 2", "--max-map-drop", "--precision fp16 or int8"),
        ("export run --out a.engine --format engine --nms --target x86", "--target, --nms", "--format onnx"),
        ("export a.onnx --out a.engine --format engine --opset 18", "--opset", "a run or checkpoint"),
        ("bundle run --out b --precision fp16 --target x86", "--target", "--precision int8"),
        ("plan --max-latency-ms 3 --out p --host-ms 1", "--host-ms", "--target"),
        ("plan --max-latency-ms 3 --out p --set seed=1", "--set", "--teachers"),
        ("--set seed=1 doctor", "--set", "a command whose --help has --set"),
        ("--seed 1 report runs/a", "--seed", "a command whose --help has --seed"),
        ("--device cpu data make --out a", "--device", "a command whose --help has --device"),
        ("plan --max-latency-ms 3 --out p --split val", "--split", "--data or --teachers"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words: str, idle: str, need: str) -> None:
    result = edgekd(*words.split())
    assert result.exit_code == 2
    assert f"{idle} do" in result.stderr
    assert result.stderr.splitlines()[1].endswith(need)


@pytest.mark.parametrize(
    "words", ["plan --out p --max-latency-ms inf", "bench a.onnx --data d --split val --max-map-drop inf"]
)
def test_options_are_finite_numbers(words: str) -> None:
    result = edgekd(*words.split())
    assert result.exit_code == 2
    assert f"{words.split()[-2]} cannot be this" in result.stderr
    assert "a finite number" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--out", "{}/a.onnx", "--opset", "99"), "expected: 17 to "),
        (("--out", "/proc/a.onnx"), "/proc/a.onnx cannot be written"),
        (("--out", "{}/file/a.onnx"), "is a file"),
    ],
)
def test_an_export_that_could_not_be_written_is_refused_before_it_is_made(
    checkpoint: Path, tmp_path: Path, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.export.job.trace", lambda *_, **__: pytest.fail("traced"))
    (tmp_path / "file").touch()
    result = edgekd("export", checkpoint, *(word.format(tmp_path) for word in words))
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "{}"), "is a folder"),
        (("--out", "{}/file/result.json"), "is a file"),
        (("--table", "{}/t.docx"), ".docx"),
        (("--table", "{}"), "no suffix"),
    ],
)
def test_bench_measures_nothing_that_it_could_not_write(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    (tmp_path / "file").touch()
    given = [word.format(tmp_path) for word in words]
    result = edgekd("bench", "nothing.onnx", "--data", "nowhere", "--split", "val", *given)
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(tmp_path) == ["file"]


def test_every_command_takes_json_and_quiet() -> None:
    def commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], set[str]]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, (*path, name))
            else:
                yield (*path, name), {option for parameter in command.params for option in parameter.opts}

    lacking = {
        " ".join(path): sorted({"--json", "--quiet"} - options)
        for path, options in commands(get_command(app), ())
        if not {"--json", "--quiet"} <= options
    }
    assert lacking == {}


def test_waiting_threads_spin_shortly_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgekd.cli

    monkeypatch.setattr(edgekd.cli, "app", lambda **_: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back as it was
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    edgekd.cli.main()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "7")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    edgekd.cli.main()
    assert os.environ["GOMP_SPINCOUNT"] == "2000"
