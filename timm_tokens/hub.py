"""Publishing mergers and trained models on the Hugging Face hub, with a model card that says what they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from timm.utils import unwrap_model
from torch import nn

from timm_tokens import identity
from timm_tokens.merger_file import NAME, merger_of, save_merger
from timm_tokens.tables import markdown

Rows = Sequence[Mapping[str, Any]]


def push_merger_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    data: str | None = None,
    table: Rows | None = None,
    dtype: torch.dtype | None = torch.float16,
    license: str | None = None,
    commit_message: str = "Add merger",
    token: str | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload the merger of a model, 0.3 MB for ViT-Tiny, for `apply_dtem_merging(vit, weights="hf-hub:user/name")`.

    A model card is made by `merger_card`, unless the repository has one already.

    Args:
        model: A TokenViT with a merger.
        repo_id: "user/name"; the repository is made where there is none.
        data: What the merger was trained on, for the card: a data set's name on the hub, or a sentence.
        table: Results for the card, one mapping from column to value for each row; None: tokens and FLOPs by r.
        dtype: Floating-point type of the uploaded weights; None keeps theirs.
        license: For the card: an identifier such as "apache-2.0".
        commit_message: Message of the commit; None: huggingface_hub's.
        token: Access token; None: the one that is stored on this machine.
        revision: Branch to commit to; None: main.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of committing.

    Raises:
        ValueError: If the model has no merger, or weights that are not finite.
    """
    api = HfApi(token=token, library_name="timm-tokens")
    with TemporaryDirectory() as folder:
        save_merger(model, Path(folder) / NAME, dtype=dtype, notes={"data": data, "table": list(table or ())})
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, "README.md", revision=revision):
            merger_card(model, repo_id, data=data, table=table, license=license).save(Path(folder) / "README.md")
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr, commit_message=commit_message
        )


def push_model_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    model_args: Mapping[str, Any] | None = None,
    made_by: str = "",
    results: Mapping[str, Any] | None = None,
    token: str | None = None,
    private: bool = False,
) -> CommitInfo:
    """Upload a trained timm model, for `timm.create_model("hf-hub:user/name", pretrained=True)`.

    `model_args` is what timm.create_model needs beside the architecture's name, such as img_size; `made_by` says for
    the card how the model was trained, as code, and `results` what was measured. The rest: see `push_merger_to_hub`.
    """
    api = HfApi(token=token, library_name="timm-tokens")
    with TemporaryDirectory() as folder:
        timm.models.save_for_hf(model, folder, model_args=dict(model_args or {}), safe_serialization=True)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not api.file_exists(repo_id, "README.md"):
            _model_card(model, repo_id, made_by, results or {}).save(Path(folder) / "README.md")
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add model")


def check_repository(repo_id: str) -> None:
    """Refuse a name that is no repository's, or a machine without access to the hub, before there is work to lose."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise ValueError(f"a repository is named user/name, got {repo_id!r}")
        HfApi(library_name="timm-tokens").whoami()
    except Exception as error:  # no token, no network, a hub that is down: each has its own
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"can't push to the hub: {reason.splitlines()[0]} (huggingface-cli login)") from error


def _model_card(model: Any, repo_id: str, made_by: str, results: Mapping[str, Any]) -> ModelCard:
    header = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification" if model.num_classes else "image-feature-extraction",
        tags=["timm", "timm-tokens", "vision-transformer"],
    )
    table = markdown(list(results), [list(results.values())], [".4g"] * len(results)) if results else "Not stated."
    made_by = made_by or "Not stated."
    body = _MODEL.format(title=repo_id.split("/")[-1], repo_id=repo_id, made_by=made_by, table=table)
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}")


_MODEL = """# {title}

Trained with timm-tokens.

```python
import timm, timm_tokens

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
```

## Training

{made_by}

## Results

{table}
"""


def merger_card(
    model: nn.Module, repo_id: str, *, data: str | None = None, table: Rows | None = None, license: str | None = None
) -> ModelCard:
    """The model card of a merger, of what `push_merger_to_hub` takes."""
    model = unwrap_model(model)
    merger, name = merger_of(model), identity.base_name(model.base)
    header = ModelCardData(
        library_name="timm-tokens",
        license=license,
        base_model=(getattr(model.base, "pretrained_cfg", None) or {}).get("hf_hub_id"),
        datasets=[data] if data and " " not in data else None,
        tags=["timm-tokens", "timm", "token-merging", "vision-transformer"],
    )
    settings = ", ".join(f"`{key}={value!r}`" for key, value in merger.config.items())
    body = _BODY.format(
        title=repo_id.split("/")[-1],
        base=f"timm's `{name}`" if name else f"a ViT with {identity.words(identity.shape(model.base))}",
        data=data or "Not stated.",
        create=f'timm.create_model("{name}", pretrained=True)' if name else "...  # the base, with its weights",
        repo_id=repo_id,
        settings=settings,
        table=_table(table or _costs(model)),
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}")


_BODY = """# {title}

A token merger for {base}: it merges the most similar tokens in each block, so that the model needs less time at almost
the same accuracy. It was made with timm-tokens and follows DTEM ([arXiv 2412.10569](https://arxiv.org/abs/2412.10569)).
The base's weights are not part of it.

```python
import timm, timm_tokens

vit = {create}
model = timm_tokens.apply_dtem_merging(vit, weights="hf-hub:{repo_id}").eval()
model.merger.r = 8  # tokens to merge in each block: fewer for accuracy, more for speed
```

## Training data

{data}

## Results

{table}

## Settings

{settings}
"""


def _costs(model: Any) -> list[dict[str, Any]]:
    """Tokens left and GFLOPs of an image, without merging and as the merger is set."""
    costs, schedule = model.costs(), model.merger.schedule
    settings = {"0": (0,) * len(schedule), "as saved": schedule}
    return [{"r": name, "GFLOPs": f"{costs.flops(counts) / 1e9:.2f}"} for name, counts in settings.items()]


def _table(rows: Rows) -> str:
    """A table whose columns are the keys of the first row."""
    columns = list(rows[0])
    values = ([row.get(column) for column in columns] for row in rows)
    return markdown(columns, [[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in values])
