"""A name on the model hub is asked for once, quickly, before any library tries it again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spin_ray.errors import BadInput, in_one_line

ASK_S = 10.0


def check_on_hub(name: str, key: str, *, kind: str = "model") -> None:
    """Raise BadInput within ASK_S for a name that is neither in the cache nor to be had.

    `kind`: model or dataset; `key`: of the config, "" where it is not known.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    other, flag = ("a folder", "") if kind == "model" else ("files", "--repo-type dataset ")
    remedy = f"give {other}, or `hf download {flag}{name}` where there is a network"
    what = f"{key}={name}" if key else name
    try:
        if not _in_cache(name, kind):
            HfApi().repo_info(name, repo_type=kind, timeout=ASK_S)
    except HFValidationError as error:
        raise BadInput(f"{what}: no folder here, and no name on the hub either ({in_one_line(error)})") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"{what}: no folder here, and the hub has no {kind} of that name (a private one needs HF_TOKEN)") from error
    except OfflineModeIsEnabled as error:
        raise BadInput(f"{what}: no folder here, not in the cache, and HF_HUB_OFFLINE says not to ask the hub; {remedy}") from error
    except Exception as error:  # the client's libraries have a dozen unrelated types for a network that is not there
        raise BadInput(f"{what}: no folder here, not in the cache, and the hub cannot be asked ({_short(error)}); {remedy}") from error


def _in_cache(name: str, kind: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir()


def _short(error: Any) -> str:
    text = in_one_line(error)
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
