"""A model's folder: weights, and beside them all that the folder it came from says about the model.

- `config.json`: written by transformers; dtype and class are those of the model in memory.
- `*.safetensors`: written as the weights are gathered, so rank 0 never holds more than a bucket of them (streamed.py).
- tokenizer and chat template: saved by the tokenizer as it was loaded.
- `generation_config.json`: the source's, byte for byte; none there, none here. transformers loads files that it refuses to save
  (a temperature without `do_sample`: Vicuna, Llama 2), and they mean the same in the export.
- `*.py` at the top: copied; the code of model and tokenizer that `trust_remote_code` runs.
- `merges.txt`, `vocab.json`, `*.model`, `*.tiktoken`, processor configs, licences: copied where the tokenizer has not written them.
- other weights (`*.bin`, `*.gguf`, `original/`) and the README: left out; they are about the source's weights.

Everything beside the weights is read when a run starts, so the end of an iteration needs nothing of the source's folder any more.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from spin_ray.errors import BadInput, in_one_line
from spin_ray.exchange.weights import shapes_in
from spin_ray.learner.names import FolderNames, Shapes, export_layout, shapes_of
from spin_ray.learner.streamed import StreamedFiles, not_writable
from spin_ray.tokenizer import load_tokenizer, save_tokenizer

CONFIG = "config.json"
FILE_BYTES = 4 * 2**30
_AS_IT_IS = ("generation_config.json", "*.py")
_UNLESS_WRITTEN = (
    "merges.txt", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)
_OF_A_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_NO_PART_OF_THE_MODEL = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.(attn|attention)\.bias|(^|\.)position_ids)$")
"""Tables that old versions of transformers wrote into checkpoints, and that every version computes."""

Beside = dict[str, bytes]
"""Name of a file -> what is in it."""


def read_beside(source: str, *, trust_remote_code: bool, chat_template: str = "") -> Beside:
    """What an export of the model at `source`, a folder or a name on the hub, has beside config and weights.

    Raises BadInput in one line where it cannot be read or its tokenizer cannot be saved. A folder without a tokenizer gets none.
    """
    folder = _small_files(source)
    has_tokenizer = any(_fits(path.name, _OF_A_TOKENIZER) for path in folder.iterdir())
    beside = _tokenizer_files(source, folder / CONFIG, trust_remote_code, chat_template) if has_tokenizer else {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if _fits(path.name, _AS_IT_IS) or (_fits(path.name, _UNLESS_WRITTEN) and path.name not in beside):
            beside[path.name] = path.read_bytes()
    return beside


def _tokenizer_files(source: str, config: Path, trust_remote_code: bool, chat_template: str) -> Beside:
    with tempfile.TemporaryDirectory(prefix="spin_ray_") as scratch:
        try:
            shutil.copy(config, scratch)  # AutoTokenizer looks at it
            tokenizer, _ = load_tokenizer(source, trust_remote_code, chat_template)
            save_tokenizer(tokenizer, scratch, trust_remote_code)
        except BadInput:
            raise
        except Exception as error:  # a tokenizer may run code of its own
            raise BadInput(f"{source}: its tokenizer cannot be saved with a trained model ({in_one_line(error)})") from error
        # named chat templates are in a folder
        written = [path for path in Path(scratch).rglob("*") if path.is_file() and path.name != CONFIG]
        return {str(path.relative_to(scratch)): path.read_bytes() for path in written}


def _small_files(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=[*_AS_IT_IS, *_UNLESS_WRITTEN, *_OF_A_TOKENIZER, CONFIG]))


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def write_beside(beside: Beside, folder: Path) -> None:
    for name, content in beside.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_model(
    lm: PreTrainedModel, buckets: Iterable[list[tuple[str, torch.Tensor]]], folder: Path, beside: Beside, *, file_bytes: int = FILE_BYTES,
) -> None:
    """Write an export from the tensors of `buckets`, whose memory may change from bucket to bucket. Nothing but a bucket is held.

    Raises RunStopped if they are not what the model has, tensor by tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(lm, folder)
    write_beside(beside, folder)
    files = StreamedFiles(export_layout(lm), folder, file_bytes=file_bytes)
    for bucket in buckets:
        for name, tensor in bucket:
            files.write(name, tensor)
    files.end()


def write_config(lm: PreTrainedModel, folder: Path) -> None:
    """config.json and the code it names, as `save_pretrained` writes them."""
    lm.config.dtype, lm.config.architectures = str(lm.dtype).removeprefix("torch."), [type(lm).__name__]
    if lm.is_remote_code():
        custom_object_save(lm, folder, config=lm.config)
    lm.config.save_pretrained(folder)


def check_export_names(lm: PreTrainedModel, source: Path) -> list[str]:
    """Whether an export of `lm` would have the tensors of the folder that it was loaded from, key by key, shape by shape.

    Computed from shapes alone, so `lm` may be sharded, or on torch's meta device. Allowed: a tied weight under one of its names or
    both; names without the base model's prefix (GPT-2's own folder); tables that every version of transformers computes; a
    buffer that the folder lacks. What transformers leaves out of every model of this class (layers that predict further tokens)
    is returned as a line for the user. Raises BadInput for anything else.
    """
    layout = export_layout(lm)
    if unknown := not_writable(layout):
        raise BadInput(f"{source}: a trained model could not be saved: {unknown[0]}, which no safetensors file holds")
    names, there, exported = FolderNames(lm), shapes_in(source), shapes_of(layout)
    there = _as_exported(there, exported, names.tied(), lm.base_model_prefix)
    gone = [name for name in there.keys() - exported.keys() if not _NO_PART_OF_THE_MODEL.search(name)]
    ignored = [name for name in gone if any(re.search(pattern, name) for pattern in lm._keys_to_ignore_on_load_unexpected or ())]
    buffers = {name for name, _ in lm.named_buffers()}
    of_buffers = {group.name for group in names.groups if buffers >= group.members.keys()}
    wanted = {name: shape for name, shape in exported.items() if name in there or name not in of_buffers}
    there = {name: shape for name, shape in there.items() if name in exported or (name in gone and name not in ignored)}
    if there != wanted:
        raise BadInput(f"{source}: its config.json is not that of its weights: {_first_differences(wanted, there)}")
    return [_says_left_out(source, sorted(ignored))] if ignored else []


def _as_exported(there: Shapes, exported: Shapes, tied: dict[str, str], prefix: str) -> Shapes:
    """The folder's tensors under the names that an export gives them."""
    with_prefix = {f"{prefix}.{name}" if name not in exported and f"{prefix}.{name}" in exported else name: s for name, s in there.items()}
    return {tied.get(name, name): shape for name, shape in with_prefix.items()}


def _says_left_out(source: Path, names: list[str]) -> str:
    return (
        f"{source}: {len(names)} tensors that transformers does not load ({names[0]}, ...) are not trained and not exported; "
        "the model answers the same, but speculative decoding that needs them must take them from the source"
    )


def _first_differences(model: Shapes, folder: Shapes) -> str:
    """The first tensor of each kind of difference between a model and a folder, and how many there are."""
    lost, made_up = sorted(folder.keys() - model.keys()), sorted(model.keys() - folder.keys())
    other = sorted(name for name in folder.keys() & model.keys() if folder[name] != model[name])
    parts = [f"{len(lost)} tensors are in the folder alone (first {lost[0]})"] if lost else []
    parts += [f"{len(made_up)} are in the model alone (first {made_up[0]})"] if made_up else []
    if other:
        first = other[0]
        parts.append(f"{len(other)} differ in shape (first {first}: {list(model[first])}, in the folder {list(folder[first])})")
    return ", ".join(parts)
