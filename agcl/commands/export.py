"""``agcl export RUN --output DIR``: a run's model for others to load."""

from dataclasses import replace
from pathlib import Path

from agcl.errors import AgclError, one_line

# transformers takes seconds to import, which the other commands do without: it is imported where it is used.


def export(
    source: Path,
    *,
    output: Path,
    task: str | None = None,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a run's model or adapter in Hugging Face's format, with a model card and the importance files.

    Args:
        source: Folder of a run, or a checkpoint (.ckpt) from a task's end.
        output: Folder to write; new or empty.
        task: Export the model as it was after this task (default: the last one). The run must have kept a checkpoint
            from that task's end.
        base_model: What others find the model that training began with under, on the hub (default: the name that the
            run was given; of a local path its last part). Card and adapter name it.
        push_to_hub: Upload the folder to this repository, too (you are logged in: `hf auth login`).
        private: Make the repository private, if it is new.
        trust_remote_code: Run model code that comes with the model. Off unless you trust its author.

    Raises:
        AgclError: If there is no such model, or the output exists, or it cannot be uploaded.
    """
    from agcl.export import export_model, find_trained

    if private and push_to_hub is None:
        raise AgclError("`private` is about the repository on the hub; add `push_to_hub`.")
    if push_to_hub is not None:
        _check_repository("push_to_hub", push_to_hub)
    if base_model is not None:
        _check_repository("base_model", base_model)
    trained = find_trained(source, task)
    if base_model is not None:
        trained = replace(trained, model_name=base_model)
    name = push_to_hub.split("/")[-1] if push_to_hub is not None else None
    export_model(trained, output, name=name, trust_remote_code=trust_remote_code)
    learned = ", ".join(trained.tasks[: trained.num_learned])
    print(f"Model after {learned}, {len(trained.importance)} importance files and model card: {output}")
    if push_to_hub is not None:
        print(f"Uploaded: {_push(output, push_to_hub, private)}")


def _check_repository(option: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise AgclError(f"`{option}` is {name!r}, no repository's name: {error}") from error


def _push(folder: Path, repository: str, private: bool) -> str:
    import huggingface_hub

    try:
        url = huggingface_hub.create_repo(repository, private=private or None, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by agcl export")
    except Exception as error:  # network, login, permission: the hub's library raises its own and its client's types
        reason = one_line(error)
        raise AgclError(f"{folder} is written, but `{repository}` could not be uploaded to: {reason}") from error
    return str(url)
