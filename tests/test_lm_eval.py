"""An exported model in EleutherAI's lm-evaluation-harness: its loglikelihood is what tools/evaluate.py adds up."""

import json
import math
import re

import pytest
from conftest import CHARACTERS, TINY, flags

TASK = """\
task: own_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""


@pytest.mark.slow
def test_its_loglikelihood_is_the_sum_of_our_nats(run, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'lm_eval[hf]' (1.8 GB)")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run("train.py", *flags(TINY, out_dir=tmp_path / "out", max_iters=30, eval_interval=30))
    run("tools/export.py", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'hf'}")
    texts, nats = ["".join(CHARACTERS[2 + (7 * k + i * i) % 59] for i in range(15)) for k in range(3)], []
    for text in texts:  # a single window, the first character being its context
        (tmp_path / "text").write_text(text)
        line = run("tools/evaluate.py", f"--out_dir={tmp_path / 'out'}", f"--file={tmp_path / 'text'}").stdout
        loss, tokens = re.search(r": ([\d.]+) nats a token, .* (\d+) tokens", line).groups()
        assert int(tokens) == 14
        nats.append(float(loss) * 14)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"context": text[0], "continuation": text[1:]}) + "\n" for text in texts))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own_text.yaml").write_text(TASK.format(data=data))
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path / 'hf'},dtype=float32,prefix_token_id=0", tasks=["own_text"], device="cpu",
        batch_size=1, task_manager=TaskManager(include_path=str(tmp_path / "tasks")), bootstrap_iters=0,
    )  # fmt: skip
    perplexity = found["results"]["own_text"]["perplexity,none"]
    assert math.log(perplexity) == pytest.approx(sum(nats) / 3, rel=1e-4)
