"""--push_to_hub: what is checked before a merge, what is uploaded, and that nobody sees the token."""

import json

import pytest

from tests.support.hub import TOKEN, USER, hub
from tests.trainer.test_faults import save_tiny
from tools.merge_checkpoint.__main__ import main
from tools.merge_checkpoint.upload import Upload

PUSH = "--push_to_hub"


@pytest.fixture
def remote(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    with hub(monkeypatch) as stand_in:
        yield stand_in


def no_token_in(directory, *texts):
    files = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    return TOKEN not in "".join(texts) and not any(TOKEN.encode() in content for content in files)


def test_all_of_it_is_uploaded_and_older_weights_go(remote, tmp_path, capsys):
    checkpoint, _ = save_tiny(tmp_path, 3)
    remote.add("we/llama", **{"model-00001-of-00002.safetensors": b"old", "my-notes.md": b"notes"})
    remote.repositories["we/llama"]["files"]["model.safetensors.index.json"] = b"old"
    output = tmp_path / "merged"
    assert main([str(checkpoint), str(output), PUSH, "we/llama"]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {output}\nuploaded it to {remote.url}/we/llama\n"
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    assert remote.repositories["we/llama"]["files"] == written | {"my-notes.md": b"notes"}
    assert 'name = "we/llama"' in written["README.md"].decode().replace("'", '"')
    assert no_token_in(tmp_path, said.out, said.err)


def test_a_new_repository_is_as_private_as_asked(remote, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name, private in (("me/open", False), ("me/closed", True)):
        Upload(name, private).run(tmp_path)
        assert remote.repositories[name] == {"private": private, "files": {"config.json": b"{}"}}
    remote.add("me/known")
    Upload("me/closed", True)
    with pytest.raises(ValueError, match="me/known: the repository is there, and public"):
        Upload("me/known", True)


@pytest.mark.parametrize(
    "arguments, change, problem",
    [
        (("llama",), {}, "--push_to_hub llama: OWNER/NAME was expected"),
        (("me/llama",), {"offline": True}, "HF_HUB_OFFLINE is set"),
        (("me/llama",), {"token": ""}, "there is no token: `hf auth login`"),
        (("me/llama",), {"token": "hf_nobodys"}, "the hub does not know the token"),
        (("me/llama",), {"token": "hf_Größe"}, "the token has characters that no token has"),
        (("she/llama",), {}, "the token is that of me, who can upload to me, we, they only"),
        (("they/llama",), {}, "the token may only read there"),
        (("me/llama",), {"role": "read"}, "the token may only read there"),
        (("me/llama",), {"fails": (500, f"Bearer {TOKEN} broke")}, "the hub cannot be asked: "),
        ((), {}, "--private says how --push_to_hub OWNER/NAME uploads"),
    ],
)
def test_what_cannot_be_uploaded_is_not_merged(
    remote, tmp_path, capsys, monkeypatch, arguments, change, problem
):
    if "offline" in change:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "token" in change:
        monkeypatch.setenv("HF_TOKEN", change["token"])
    if "role" in change:
        remote.user = USER | {"auth": {"accessToken": {"role": change["role"]}}}
    if "fails" in change:
        remote.fails["/whoami"] = change["fails"]
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    flags = [PUSH, *arguments] if arguments else ["--private"]
    # There is no checkpoint: it would be the error if something was read before.
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "merged"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error
    assert TOKEN not in error and "hf_nobodys" not in error and "Größe" not in error
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("part", ["/api/repos/create", "/large/", "/commit/"])
def test_a_failed_upload_keeps_the_model(remote, tmp_path, capsys, monkeypatch, part):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    checkpoint, _ = save_tiny(tmp_path, 3)
    remote.fails[part] = (403, f"no room left for {TOKEN}")
    output = tmp_path / "my model"
    assert main([str(checkpoint), str(output), PUSH, "me/llama", "--private"]) == 1
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("error: --push_to_hub me/llama: ") and no_token_in(tmp_path, said.out, said.err)
    assert f"{output} is complete, and `hf upload me/llama '{output}' . --private` uploads it" in last
    assert json.loads((output / "config.json").read_text()) and (output / "model.safetensors").exists()
