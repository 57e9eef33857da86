"""`t2i VERB`: every command under one name, with what it needs outside a checkout."""

import os
import re
import runpy
import shutil
import sys
import sysconfig
import tomllib
from importlib import import_module
from pathlib import Path

import processes
import pytest
from setuptools import Distribution

import t2i
from t2i import __main__ as console
from t2i.errors import UserError
from t2i.shipped import SHIPPED, find_shipped
from t2i.train.ds_config import read_ds_config
from t2i.verbs import SCRIPTS, as_typed, command_line, own_command_line

ROOT = Path(__file__).parents[1]


def start(*words):
    """Run `python -m t2i` in a process of its own."""
    return processes.run(
        [sys.executable, "-m", "t2i", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_every_verb_in_the_order_of_the_story_and_imports_nothing():
    check = """
import runpy, sys
sys.argv = ["t2i", "--help"]
runpy.run_module("t2i", run_name="__main__")
late = {"tyro", "yaml", "torch", "numpy", "t2i.config"} & set(sys.modules)
assert not late, late
"""
    done = processes.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  ([\w-]+) +\S", done.stdout, re.M) == list(console.VERBS)
    assert list(console.VERBS) == [*SCRIPTS, "env"]


def test_each_verb_explains_itself_as_it_was_typed_without_torch():
    check = f"""
import sys
from t2i.__main__ import dispatch
for verb in {console.VERBS!r}:
    sys.argv = ["t2i", verb, "--help"]
    try:
        dispatch()
    except SystemExit as end:
        assert end.code in (0, None), (verb, end.code)
heavy = {{"torch", "transformers", "diffusers", "numpy", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = processes.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    helps = dict(zip(console.VERBS, re.split(r"^usage: ", done.stdout, flags=re.M)[1:], strict=True))
    for verb, text in helps.items():
        assert text.startswith(f"t2i {verb} ")
        examples = re.search(r"^Examples?:\n((?:  .*\n)+)", text, re.M)[1]
        assert f"t2i {verb}" in examples and not re.search(r"(launchers|eval)/\w+\.py", examples)
        assert console.first_line(verb) in text


def test_an_unknown_verb_is_a_sentence_with_the_nearest_one():
    done = start("trian", "--data.seq-len", "96")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "t2i has no command 'trian'; perhaps you meant train. `t2i --help` lists them all.\n"
    )


@pytest.mark.parametrize(("verb", "script"), SCRIPTS.items())
def test_a_script_runs_the_same_command(verb, script):
    assert (
        runpy.run_path(str(ROOT / script))["main"]
        is import_module(f"t2i.commands.{console.module_of(verb)}").main
    )


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_a_script_under_a_python_without_t2i_names_what_installs_it(script):
    done = processes.run([sys.executable, "-S", "-E", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "No module named 't2i'. Run `make install`, then use .venv/bin/python.\n"


def test_a_package_that_is_missing_is_a_sentence():
    done = processes.run(
        [sys.executable, "-S", "-E", "-m", "t2i", "train"], cwd=ROOT, capture_output=True, text=True
    )
    assert "which t2i needs: run `make install`" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("made_in", "is_made"), [("", False), (str(ROOT), False), ("/elsewhere", True)])
def test_an_environment_of_another_folder_is_made_anew(made_in, is_made, tmp_path):
    (tmp_path / ".installed").write_text(made_in)
    command = ["make", "--dry-run", "install", f"VENV={tmp_path}"]
    said = processes.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (f"-m venv --clear {tmp_path}" in said) == is_made
    assert ("pip install" in said) == is_made


def test_advice_names_the_command_as_it_was_typed(tmp_path, call, monkeypatch, capsys):
    assert call("launchers/prepare.py", "--check", tmp_path) == 3
    assert capsys.readouterr().err.endswith("Make one with launchers/prepare.py.\n")
    monkeypatch.setattr(sys, "argv", ["t2i", "prepare", "--check", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        console.main()
    assert ended.value.code == 3
    assert capsys.readouterr().err.endswith("Make one with t2i prepare.\n")


def test_the_console_command_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["t2i"].partition(":")
    assert getattr(import_module(module), name) is console.main


@pytest.mark.parametrize("ranks", [[], ["--local_rank=1"]])
def test_a_launcher_may_put_its_rank_before_the_verb(ranks, monkeypatch):
    seen = []
    monkeypatch.setattr("t2i.commands.verify_resume.main", lambda: seen.append(list(sys.argv)))
    for verb in ("verify-resume", "verify_resume"):
        monkeypatch.setattr(sys, "argv", ["t2i", *ranks, verb, "--num-steps", "4"])
        console.dispatch()
    assert seen == [["t2i verify-resume", *ranks, "--num-steps", "4"]] * 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["launchers/train.py", "--run-dir", "a b"], "python launchers/train.py --run-dir 'a b'"),
        (["launchers/train.py", "--local_rank=0", "--x"], "deepspeed launchers/train.py --x"),
        (["t2i train", "--run-dir", "a b"], "t2i train --run-dir 'a b'"),
        (["t2i train", "--local_rank=0", "--x"], "deepspeed --module t2i train --x"),
        (["t2i score compare", "a", "b"], "t2i score compare a b"),
    ],
)
def test_a_command_is_written_out_as_it_was_typed(argv, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert own_command_line() == line
    report = "t2i report run" if argv[0].startswith("t2i ") else "python launchers/report.py run"
    assert command_line("report", "run") == report


def test_examples_are_those_of_the_way_a_command_was_typed(monkeypatch):
    text = "python eval/coco_fid.py a\ndeepspeed --num_gpus 2 launchers/train.py\ntorchrun --n 8 launchers/sample.py\n"
    monkeypatch.setattr(sys, "argv", ["launchers/train.py"])
    assert as_typed(text) == text
    monkeypatch.setattr(sys, "argv", ["t2i train"])
    assert as_typed(text) == (
        "t2i score a\ndeepspeed --num_gpus 2 --module t2i train\ntorchrun --n 8 -m t2i sample\n"
    )


def test_shipped_files_are_found_by_path_and_by_name_where_there_is_no_checkout(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    caplog.set_level("INFO", logger="t2i")
    for name in ("ds_configs/zero2.json", "zero2.json"):
        assert find_shipped(Path(name)) == SHIPPED / "ds_configs" / "zero2.json"
        assert read_ds_config(Path(name)) == read_ds_config(ROOT / "ds_configs" / "zero2.json")
    assert (
        f"zero2.json is not here, so the file of that name that ships with t2i is used: {SHIPPED}"
        in caplog.text
    )
    assert find_shipped(Path("paper_1b.yaml")).samefile(ROOT / "launchers/configs/paper_1b.yaml")
    assert find_shipped(Path("launchers/studies/mini.yaml")).samefile(ROOT / "launchers/studies/mini.yaml")
    assert find_shipped(Path("launchers/train.py")).samefile(ROOT / "launchers/train.py")
    assert find_shipped(Path("other/zero2.json")) == Path("other/zero2.json")
    with pytest.raises(UserError, match="--ds_config zero3.json cannot be read"):
        read_ds_config(Path("zero3.json"))


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("zero2.json")
    own.write_text("{}")
    assert find_shipped(own) == own


def test_the_wheel_has_every_file_of_the_package_and_the_shipped_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    package = Distribution({"script_name": "setup.py"})
    package.parse_config_files()
    package.include_package_data = False  # what is declared, whatever version control knows
    build = package.get_command_obj("build_py")
    build.ensure_finalized()
    built = {
        str(Path(file).relative_to(build.build_lib)) for file in build.get_outputs(include_bytecode=False)
    }
    there = {
        str(Path(folder, name))
        for folder, _, names in os.walk("t2i", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    assert there - built == set()
    shipped = {"ds_configs/zero2.json", "launchers/configs/paper_1b.yaml", "launchers/studies/mini.yaml"}
    assert {f"t2i/shipped/{name}" for name in (*shipped, *SCRIPTS.values())} <= built
    assert package.metadata.version == t2i.__version__


def without_what_git_ignores(folder, names):
    ignored = {".venv", ".git", "site", "runs", "data", "build"} if folder == str(ROOT) else set()
    return ignored & set(names) | {
        name for name in names if name.endswith((".egg-info", "_cache", "__pycache__"))
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with a built wheel of t2i and this environment's other packages; returns its folder."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=without_what_git_ignores)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    flags = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    processes.run([*pip, "wheel", *flags, "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    shutil.rmtree(source)
    processes.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    processes.run([*pip, "--python", python, "install", *flags, wheel], check=True)
    # A line in a .pth file is one more place to look, after the environment's own; editable installs there stay off.
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = processes.run(where, check=True, capture_output=True, text=True).stdout
    (Path(site.strip()) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.slow
def test_an_installed_package_prepares_trains_and_samples_without_a_checkout(installed):
    python, empty = installed / "venv" / "bin" / "python", installed / "empty"
    kept = {name: value for name, value in processes.environment().items() if name != "PYTHONPATH"}

    def run(*words):
        done = processes.run(
            list(map(str, words)),
            cwd=empty,
            env=kept,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    command = python.with_name("t2i")
    place = run(python, "-c", "import t2i; print(t2i.__file__)")
    assert str(installed / "venv") in place
    assert "prepare" in run(command, "--help")
    run(command, "prepare", "--source", "openmoji", "--max-caption", 12, "--out", "data/openmoji64")
    tiny = [
        "--model.num-layers",
        1,
        "--model.hidden-size",
        32,
        "--model.num-heads",
        2,
        "--train.eval-images",
        4,
    ]
    tiny += ["--train.global-batch-tokens", 768, "--train.save-every", 1]
    said = run(command, "train", "--ds_config", "ds_configs/zero2_fp32.json", "--train.max-steps", 2, *tiny)
    assert "ships with t2i" in said
    launcher = [
        python,
        Path(sys.executable).with_name("deepspeed"),
        "--num_gpus",
        1,
        "--module",
        "t2i",
        "train",
    ]
    run(
        *launcher,
        "--ds_config",
        "zero2_fp32.json",
        "--run-dir",
        "runs/launched",
        "--train.max-steps",
        1,
        *tiny,
    )
    assert (empty / "runs" / "launched" / "latest").is_file()
    status = (empty / "runs" / "launched" / "status.json").read_text()
    assert "t2i report runs/launched" in status
    assert "Open" in run(command, "report", "runs/train")
    run(command, "sample", "runs/train", "--prompts", "red apple", "--out", "images")
    assert (empty / "images" / "00000.png").is_file()
    # 20 of the arms, and the language model that they begin from.
    assert "21 runs" in run(command, "study", "mini.yaml", "--plan")
