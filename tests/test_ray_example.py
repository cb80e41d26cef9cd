"""examples/ray_generate.py without Ray: prompts, unfinished runs, results, refusals, manifest."""

from __future__ import annotations

import importlib
import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cli_models import SPECIAL, WORDS, save_tokenizer, tiny_llama
from hf_models import tiny_model, tokens

pytest.importorskip("transformers")

from mla.integrations.converted import convert_model, load_converted, save_converted

ROOT = Path(__file__).parent.parent
MANIFEST = ROOT / "examples/kubernetes/rayjob.yaml"
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12", "w13"]
ENDS = [7, 11]


@pytest.fixture
def example(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("ray_generate")


@pytest.fixture
def in_process(example, monkeypatch):
    """Parts in this process, last one first; the list of those that were computed."""
    computed = []

    def run_parts(task, parts, options):
        generator = example.Generator(task)
        for part, ids in reversed(parts.items()):
            computed.append(part)
            row = generator({"part": part, "prompts": json.dumps(ids)})
            assert not row["error"], row["error"]
            yield row

    monkeypatch.setattr(example, "cluster", lambda options: nullcontext())
    monkeypatch.setattr(example, "run_parts", run_parts)
    return computed


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Float64, so that padding decides about no token."""
    model = tiny_llama().double()
    model.generation_config.eos_token_id = ENDS
    folder = tmp_path_factory.mktemp("models") / "converted"
    save_converted(convert_model(model, tokens(2, 24, seed=1), kv_budget=0.75), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def command(model_folder, tmp_path):
    """Arguments of a run of two parts and a half."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    paths = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out.jsonl")]
    sizes = ["--batch-size", "2", "--max-new-tokens", "20"]
    return ["--model", str(model_folder), *paths, *sizes]


def results(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def alone(model, prompt, count):
    with torch.inference_mode():
        found = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return found[0, len(prompt) :].tolist()


def test_results_are_those_of_each_prompt_alone_in_the_order_of_the_file(
    example, in_process, model_folder, command, tmp_path, capsys
):
    assert example.main(command) == 0
    assert in_process == [2, 1, 0]
    model = load_converted(model_folder).model
    found = results(tmp_path)
    assert [(row["index"], row["prompt"]) for row in found] == list(enumerate(PROMPTS))
    for row in found:
        ids = [len(SPECIAL) + WORDS.index(word) for word in row["prompt"].split()]
        assert row["new_tokens"] == alone(model, ids, 20)
    lengths = [len(row["new_tokens"]) for row in found]
    assert min(lengths) < max(lengths), "the end tokens must matter"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]
    out, error = capsys.readouterr()
    assert out.startswith(f"ray_generate: 5 prompts, {sum(lengths)} new tokens in ")
    assert "ray_generate: 5 of 5 prompts, " in error


def test_a_run_that_was_cut_off_goes_on_and_computes_what_is_missing(
    example, in_process, command, tmp_path
):
    out = tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.unfinished"
    assert example.main(command) == 0
    whole = out.read_bytes()
    out.unlink()
    del in_process[:]

    finished = [row["new_tokens"] for row in results_of(whole)]
    head = json.dumps(example.settings(example.build_parser().parse_args(command)))
    line = json.dumps({"part": 1, "worker": "here:1", "new_tokens": finished[2:4]})
    journal.write_text(f'{head}\n{line}\n{{"part": 0, "new_tok')
    assert example.main(command) == 0
    assert in_process == [2, 0] and out.read_bytes() == whole and not journal.exists()


def results_of(data):
    return [json.loads(line) for line in data.splitlines()]


def test_another_run_and_finished_results_are_not_touched_without_force(
    example, in_process, command, tmp_path, capsys
):
    journal, out = tmp_path / "out.jsonl.unfinished", tmp_path / "out.jsonl"
    longer = [*command[:-1], "21"]
    head = json.dumps(example.settings(example.build_parser().parse_args(longer)))
    journal.write_text(head + '\n{"part": 0, "worker": "here:1", "new_tokens": [[4], [5]]}\n')
    assert example.main(command) == 1
    assert (
        "is of a run with another max-new-tokens; --force begins again" in capsys.readouterr().err
    )
    out.write_text("kept")
    assert example.main(longer) == 1
    assert f"--out has the file {out}, which exists; --force" in capsys.readouterr().err
    assert out.read_text() == "kept" and in_process == []
    assert example.main([*command, "--force"]) == 0
    assert len(results(tmp_path)) == 5 and not journal.exists()


def test_token_ids_and_coded_rows_of_an_mla_model(example, in_process, tmp_path):
    model = tiny_model("deepseek_v3").float()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"tokens": [5, 9, 3]}\n\n{"tokens": [4]}\n')
    paths = ["--model", "model", "--prompts", "p.jsonl", "--out", "out.jsonl"]
    arguments = [str(tmp_path / x) if not x.startswith("--") else x for x in paths]
    assert example.main([*arguments, "--max-new-tokens", "3", "--codec", "int8"]) == 0
    found = results(tmp_path)
    assert [row["tokens"] for row in found] == [[5, 9, 3], [4]]
    assert [set(row) for row in found] == [{"index", "tokens", "new_tokens"}] * 2
    assert [len(row["new_tokens"]) for row in found] == [3, 3]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "a", "--prompts has the file p.csv, expected a .txt or .jsonl file"),
        ("p.txt", None, "--prompts has the file p.txt, which does not exist"),
        ("p.txt", "\n \n", "p.txt holds no prompts, expected at least one line"),
        ("p.jsonl", '{"prompt": "w1"}\n{', "p.jsonl:2 is not JSON: "),
        ("p.jsonl", '{"prompt": ""}', "p.jsonl:1 holds no prompt, expected "),
        ("p.jsonl", '{"tokens": [1.5]}', "p.jsonl:1 holds no prompt, expected "),
        ("p.jsonl", '{"tokens": [4]}\n{"tokens": [4, 64]}', "prompt 1 has token 64, expected 0 to"),
        ("p.jsonl", json.dumps({"tokens": [4] * 500}), "prompt 0 has 500 tokens and 20 are to"),
    ],
)
def test_bad_prompts_give_one_line_before_anything_starts(
    example, in_process, model_folder, tmp_path, monkeypatch, capsys, name, text, message
):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    arguments = ["--model", str(model_folder), "--prompts", name, "--out", "out.jsonl"]
    assert example.main([*arguments, "--max-new-tokens", "20"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ray_generate: failed: {message}") and error.count("\n") == 1
    assert in_process == [] and not list(tmp_path.glob("out*"))


def test_what_is_no_mla_model_is_refused(example, in_process, command, tmp_path, capsys):
    for folder, message in [
        (tmp_path / "llama", "holds no MLA model: "),
        (tmp_path, "has no conf"),
    ]:
        if folder.name == "llama":
            tiny_llama().save_pretrained(folder)
            capsys.readouterr()  # its bar
        assert example.main(["--model", str(folder), *command[2:]]) == 1
        error = capsys.readouterr().err
        assert f"{folder} {message}" in error and error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        example.main([*command, "--workers", "0"])
    error = capsys.readouterr().err
    assert "--workers: has value 0, expected at least 1" in error and error.count("\n") == 1


def test_an_error_in_a_worker_is_part_of_its_row(example, model_folder):
    values = {"max_new_tokens": 2, "codec": None, "dtype": None, "num_threads": 1}
    task = example.Task(model=model_folder / "nowhere", device="cpu", **values)
    row = example.Generator(task)({"part": 3, "prompts": "[[4]]"})
    assert row["part"] == 3 and "nowhere does not exist" in row["error"]


def test_manifest_runs_the_script_on_the_tested_ray(example):
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load(MANIFEST.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    python, script, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert python == "python" and (ROOT / Path(script).relative_to("/opt/mla")).is_file()
    options = example.build_parser().parse_args(arguments)
    assert options.address == "auto"
    spec = manifest["spec"]["rayClusterSpec"]
    version = spec["rayVersion"]
    assert f"RAY := {version}\n" in (ROOT / "Makefile").read_text()
    (workers,) = spec["workerGroupSpecs"]
    assert workers["replicas"] == options.workers
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"].endswith(f":{version}")
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        for path in (options.model, options.prompts, options.out):
            assert any(path.is_relative_to(mount) for mount in mounts.values())
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) == options.cpus
