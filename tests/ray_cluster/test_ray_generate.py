"""examples/ray_generate.py on a cluster of this machine; run by `make test-ray`.

The folder is not called ray: on the path of the tests, that would pass for the missing package.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_models import SPECIAL, WORDS, save_tokenizer, tiny_llama
from hf_models import tokens

pytest.importorskip("ray", reason="no Ray: run make test-ray")

from mla.integrations.converted import convert_model, load_converted, save_converted

EXAMPLES = Path(__file__).parents[2] / "examples"
ENDS = [7, 11]
NUM_PROMPTS, BATCH_SIZE, NEW_TOKENS = 61, 4, 48
DYING = """
import os, sys
import ray_generate

class Dying(ray_generate.Generator):
    def __call__(self, row):
        os._exit(1)

ray_generate.Generator = Dying
sys.exit(ray_generate.main())
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A converted model in float64, so that padding decides about no token; some prompts end."""
    model = tiny_llama().double()
    model.generation_config.eos_token_id = ENDS
    folder = tmp_path_factory.mktemp("models") / "converted"
    save_converted(convert_model(model, tokens(2, 24, seed=1), kv_budget=0.75), folder)
    save_tokenizer(folder)
    return folder


def start(script, model, prompts, out, *options):
    paths = [str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(script), "--model", str(model), "--prompts", str(prompts)]
        + ["--out", str(out), "--batch-size", str(BATCH_SIZE)]
        + ["--max-new-tokens", str(NEW_TOKENS), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"},
    )


def alone(model, prompt):
    """Greedy continuation of one prompt, in this process and without a batch."""
    with torch.inference_mode():
        found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return found[0, len(prompt) :].tolist()


def first_finished(journal, process):
    """The journal's line of the first part that is finished, and the number of parts by then."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        if len(lines) > 1 and lines[1].endswith("\n"):
            return json.loads(lines[1]), len(lines) - 1
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no part was finished: {process.communicate()}")


def test_each_prompt_has_its_tokens_once_after_a_worker_was_killed(model_folder, tmp_path):
    rng = random.Random(5)
    prompts = [rng.choices(WORDS, k=rng.randint(1, 17)) for _ in range(NUM_PROMPTS)]
    file, out = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    file.write_text("".join(" ".join(words) + "\n" for words in prompts))
    process = start(EXAMPLES / "ray_generate.py", model_folder, file, out, "--workers", "2")
    line, finished = first_finished(out.with_name("results.jsonl.unfinished"), process)
    assert finished < NUM_PROMPTS // BATCH_SIZE // 2, "it has to be killed while there is work"
    killed = int(line["worker"].rpartition(":")[2])
    os.kill(killed, signal.SIGKILL)
    output, error = process.communicate(timeout=400)
    assert process.returncode == 0, error

    model = load_converted(model_folder).model
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in results] == list(range(NUM_PROMPTS))
    lengths = set()
    for words, row in zip(prompts, results, strict=True):
        assert row["prompt"] == " ".join(words)
        assert row["new_tokens"] == alone(model, [len(SPECIAL) + WORDS.index(w) for w in words])
        lengths.add(len(row["new_tokens"]))
    assert len(lengths) > 2, "the end tokens must matter"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "results.jsonl"]
    # Its part was computed by the process that took its place.
    assert int(output.rsplit(", ", 1)[1].split()[0]) == 3, output
    assert f"{NUM_PROMPTS} of {NUM_PROMPTS} prompts" in error


def test_a_part_that_always_kills_its_worker_ends_the_run(model_folder, tmp_path):
    script, file, out = (tmp_path / name for name in ("dying.py", "p.jsonl", "out.jsonl"))
    script.write_text(DYING)
    file.write_text('{"tokens": [4, 5]}\n')
    process = start(script, model_folder, file, out, "--workers", "1")
    output, error = process.communicate(timeout=400)
    assert process.returncode == 1, error
    assert error.splitlines()[-1].startswith("ray_generate: failed: Ray has given up"), error
    assert "ray_generate" not in output and not out.exists()  # Ray itself says that a worker died
