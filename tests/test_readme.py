"""README, docs/ and CONTRIBUTING.md: each command works, each example too, and each link leads somewhere."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import ROOT, copy_project, write_synthetic

import configurator

README, DOCS, CONTRIBUTING = ROOT / "README.md", sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md"


def blocks(path, language):
    """The text of each block in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


# ----------------------------------------------------------------------------------------------
# the commands


def commands_in(block):
    """Each command in the text of a block, those joined by && taken apart."""
    lines = block.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s#.*", "", line).strip() for line in lines if not line.startswith("#")]
    whole = [line for line in lines if line and "requirements-dev.txt" not in line]  # that one is the command we are in
    parts = [part.strip() for line in whole for part in line.split("&&")]
    return [re.sub(r"\.venv/bin/|\bpython3\b", lambda m: "" if "venv" in m[0] else "python", part) for part in parts]


def commands():
    """Each command that a reader may type, once: README's, then those of docs/ by name, then CONTRIBUTING.md's."""
    found = [block for path in [README, *DOCS] for block in blocks(path, "sh")] + blocks(CONTRIBUTING, "bash")
    return list(dict.fromkeys(command for block in found for command in commands_in(block)))


def requirements_are_met(command, project):
    """pip finds everything named there installed already, so the names and versions are right."""
    arguments = [a for a in shlex.split(command)[2:] if not a.startswith(("--index-url", "--extra-index-url", "http"))]
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", *arguments]
    done = subprocess.run(pip, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def settings_parse(command, project):
    """The script is there, and takes the config files and settings."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = project / words[at]
    namespace = {name: eval(default) for name, (default, _) in configurator.documented(script).items()}
    before = sys.argv, os.getcwd()
    sys.argv = words[at:]
    os.chdir(project)
    try:
        configurator.configure(namespace, [].append if words[at].startswith("data/") else None)
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    sizes = [re.search(rf"--{name}=(\d+)", command) for name in ("nnodes", "nproc_per_node")]
    if "torchrun" in command:
        processes = math.prod(int(size[1]) for size in sizes if size)
        assert namespace["gradient_accumulation_steps"] % processes == 0, f"{processes} processes: {command}"


def is_a_program(command, project):
    """The script named there is there, and is Python."""
    path = ROOT / shlex.split(command)[1]
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


# What is not run: (the commands, the reason, what is checked instead).
NOT_RUN = [
    (r"python -m venv \.venv|source .*", "the tests' own environment stands for it", None),
    (r"pip install .*", "needs the network", requirements_are_met),
    (r"python data/openwebtext/prepare\.py.*", "fetches 53 GB", settings_parse),
    (r"(\w+=\S+ )*torchrun .*--nnodes=.*", "needs several machines", settings_parse),
    (r"python tools/bench\.py.*", "takes minutes to hours, and its timings want a quiet machine", is_a_program),
    (r"python tools/gpu_check\.py.*", "needs a GPU", is_a_program),
    (r"lm_eval .*", "needs a library of 1.8 GB, and the network", None),
    (r"python -m pytest .*|ruff check \.|\.ci/run|tests/versions\.sh", "these tests are a part of it", None),
]

# A GPT-2 of another size, in a folder, for OpenAI's from the network.
TINY_GPT2 = dict(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=50257)
ONCE = "--device=cpu --max_iters=2 --eval_iters=1 --eval_interval=1 --log_interval=1 --peak_flops=1e9 --wandb_log=False"
SIZES = f"{ONCE} --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=2"
FROM_GPT2 = "--init_from=tiny-gpt2 --device=cpu"
# What is run: (the commands, what is added to them).
RUN = [
    (r"python tools/evaluate\.py .*--init_from=gpt2.*", "--init_from=tiny-gpt2 --device=cpu --stride=16"),
    (r"python tools/evaluate\.py.*", "--device=cpu"),
    (r"python tools/plan\.py.*", ""),
    (r"python train\.py .*(--init_from=gpt2|config/(finetune|eval)_).*",
     f"{ONCE} {FROM_GPT2} --block_size=16 --batch_size=2 --gradient_accumulation_steps=2"),
    (r"python sample\.py .*--init_from=gpt2.*", f"{FROM_GPT2} --max_new_tokens=20"),
    (r"python data/\w+/prepare\.py.*", ""),
    (r"python train\.py .*--init_from=(resume|auto).*", f"{ONCE} --max_iters=4"),
    (r"python train\.py.*", SIZES),
    (r"(\w+=\S+ )*torchrun --standalone .*train\.py.*", SIZES),
    (r"(echo .*\| *)?python sample\.py.*", "--device=cpu --max_new_tokens=20"),
    (r"python tools/(plot|export)\.py.*", ""),
    (r"mv \S+\.pt \S+\.pt", ""),
]


def rule(command, rules):
    return next((found for pattern, *found in rules if re.fullmatch(pattern, command)), None)


def test_every_command_has_a_rule():
    assert len(commands()) >= 8
    assert [c for c in commands() if not rule(c, NOT_RUN) and not rule(c, RUN)] == []
    assert [p for p, *_ in NOT_RUN + RUN if not any(re.fullmatch(p, c) for c in commands())] == []


def test_every_command_inside_a_sentence_takes_its_settings(project):
    for path in [README, *DOCS, CONTRIBUTING]:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        for command in re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", text.replace("\n", " ")):
            own_arguments = re.search(r" (tests/|tools/(bench|gpu_check)\.py)", command)  # no settings of a config
            (is_a_program if own_arguments else settings_parse)(command, project)


def test_the_slurm_script_starts_a_run_whose_settings_fit(project):
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    [script] = re.findall(r"^```bash\n(#!/bin/bash.*?)^```", text, re.S | re.M)
    [nodes] = re.findall(r"#SBATCH .*--nodes=(\d+)", script)
    [command] = re.findall(r"^srun (torchrun .*)$", script.replace("\\\n", " "), re.M)
    settings_parse(command.replace('"$SLURM_NNODES"', nodes), project)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


TEXT = Path(os.__file__).read_text(encoding="utf-8")[:30000]


def type_in(project, command):
    """Runs `command`, one that RUN has a rule for, in that folder; its Result."""
    [added] = rule(command, RUN)
    environment = os.environ | {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    for word in shlex.split(command):
        if word.endswith(".txt") and "/" not in word:  # the user's own text, or prompt
            (project / re.sub("^--\\w+=(FILE:)?", "", word)).write_text(TEXT, encoding="utf-8")
    small = re.sub(r"--nproc_per_node=\d+", "--nproc_per_node=2", f"{command} {added}")
    shell = ["bash", "-c", small]
    done = subprocess.run(shell, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{small}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_every_command_works_in_turn(tmp_path):
    project = copy_project(tmp_path / "copy")
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    # what the commands would fetch, or what is the user's: a text, and tokens for the largest dataset
    (project / "data" / "shakespeare_char" / "input.txt").write_text(TEXT, encoding="utf-8")
    write_synthetic(project / "data" / "openwebtext", meta=None)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY_GPT2)).save_pretrained(project / "tiny-gpt2")
    for command in commands():
        left_out = rule(command, NOT_RUN)
        if left_out:
            reason, check = left_out
            if check:
                check(command, project)
            continue
        type_in(project, command)
    # docs/gpt2.md's program reads the folder that one of the commands has exported
    [program] = blocks(ROOT / "docs" / "gpt2.md", "python")
    program = re.sub(r"max_new_tokens=\d+", "max_new_tokens=8", program)  # the small model's context is a short one
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("The "), done.stderr


@pytest.mark.slow
def test_the_prepare_script_in_docs_data_makes_a_dataset_that_train_and_sample_take(work):
    document = ROOT / "docs" / "data.md"
    [script], [typed] = blocks(document, "python"), blocks(document, "bash")
    [path] = re.findall(r"Save it as `(data/\w+/prepare\.py)`", document.read_text(encoding="utf-8"))
    (work / path).parent.mkdir()
    (work / path).write_text(script, encoding="utf-8")
    (work / path).with_name("input.txt").write_text(TEXT, encoding="utf-8")
    prepare, train, sample = commands_in(typed)
    type_in(work, prepare)
    characters = len(set(TEXT.lower()))
    assert f"found vocab_size = {characters}" in type_in(work, train).stdout
    written = type_in(work, sample).stdout
    assert written.startswith("the ") and written == written.lower()


# ----------------------------------------------------------------------------------------------
# the links


def anchors(path):
    """The names that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [README, *DOCS, CONTRIBUTING], ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading_in_it(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
