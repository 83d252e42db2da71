"""The story in six acts and an ending, played with the real programs.

Each act runs the commands that it shows and then looks whether what they promise has happened. An
act that does not do what the story says raises; nothing is told that did not take place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from cai.demo import asking, ending, recipe, refusals
from cai.demo.parties import mounts_under
from cai.demo.recipe import HOST_UP
from cai.demo.stage import Stage
from cai.demo.telling import Act, StoryBroken


def perform(stage: Stage) -> dict[str, Any]:
    """Play all acts.

    Returns:
        Members of the JSON document: ``acts``, ``refusals``, ``audit``, ``by_hand``.

    Raises:
        StoryBroken: something did not happen as the story says.
        CaiError: a party failed.
    """
    acts: list[tuple[str, str, Callable[[Stage, Act], None]]] = [
        ("Take", "A real model, in clear, on its owner's machine.", take),
        ("Seal", "The owner seals it. The key goes to the owner's key broker.", seal),
        ("Prove", "The GPU host asks for the key, and has to prove what it is.", prove),
        ("Serve", "The model appears inside the guest, and only there.", serve),
        ("Ask", "A client asks through a tunnel that checks the guest for every session.", ask),
        ("Refuse", "And now everything that must not work.", refusals.refuse),
    ]
    stage.tell.title(
        "cai demo",
        "A sealed model, a key that only a proven guest gets, a client that checks for itself.\n"
        "The TEE is SIMULATED: what says so proves nothing about hardware. All else is real.",
    )
    for number, (title, sentence, play) in enumerate(acts, start=1):
        with stage.tell.act(number, title, sentence) as act:
            play(stage, act)
            stage.parties.require_running()
    return ending.end(stage)


def take(stage: Stage, act: Act) -> None:
    """Act 1: look at the plain model."""
    files = [path for path in stage.model.directory.rglob("*") if path.is_file()]
    act.facts = {
        "name": stage.model.name, "origin": stage.model.origin, "files": len(files),
        "bytes": stage.model.size,
    }
    stage.tell.did(
        f"{stage.model.name}: {len(files)} files, {stage.model.size / 1e6:.1f} MB",
        detail=f"from {stage.model.origin}",
    )


def seal(stage: Stage, act: Act) -> None:
    """Act 2: a simulated vendor, a key broker, and the model sealed into it."""
    tell, parties = stage.tell, stage.parties
    simulate = ["python", "-m", "cai.attest.sim", "create", "sim"]
    tell.command(simulate)
    parties.require("simulator", simulate)
    tell.did("a platform with vendor roots of its own", simulated=True)
    broker = [
        "kbs", "serve", "--data", "kbs-data", "--listen", f"127.0.0.1:{stage.ports.kbs.number}",
        "--admin-listen", f"127.0.0.1:{stage.ports.admin.number}",
        "--collateral", "sim/anchors/collateral", "--rims", "sim/anchors/rims",
        "--ocsp", "sim/anchors/ocsp", "--unsafe-simulated-root", "sim/anchors",
        "--json",
    ]
    tell.command(broker)
    stage.ports.kbs.give()
    stage.ports.admin.give()
    with tell.waiting("the key broker starts"):
        parties.start("kbs", broker).wait_document(lambda value: "listening" in value)
    tell.did(
        "the key broker listens, and denies everything", detail="SQLite, kbs-data/", simulated=True
    )
    sealing = [
        "cai", "encrypt", str(stage.model.directory), "-o", "sealed", "--key-out", "model.key",
        "--kbs", stage.admin_url, "--key-id", recipe.KEY_ID, "--admin-key", "kbs-data/admin.key",
        "--owner-key", "owner.key", "--json",
    ]
    tell.command(sealing)
    with tell.waiting("sealing"):
        report = parties.require("encrypt", sealing).document()
    stage.model_root, stage.owner_key = str(report["root"]), str(report["owner_key"])
    objects = list((stage.work / "sealed" / "objects").iterdir())
    act.simulated = True
    act.facts = {
        "model_root": stage.model_root, "content_root": report["content_root"],
        "objects": len(objects), "key_id": recipe.KEY_ID,
    }
    tell.did(f"sealed into {len(objects)} objects; names and tree are hidden as well")
    tell.did(f"its identity everywhere from here on: {stage.model_root[:16]}…")


def prove(stage: Stage, act: Act) -> None:
    """Act 3: no policy, no key; then a policy for exactly this guest, and the key."""
    tell, parties = stage.tell, stage.parties
    recipe.write_env(
        stage.work / "cai.env", trustee_url=stage.kbs_url, service_port=stage.ports.service.number,
        mount_point=stage.mount_point,
    )
    stage.mount_point.mkdir(mode=0o700)
    measure = [
        "cai", "measure", "--env", "cai.env", "--owner-key", stage.owner_key,
        "--service", recipe.SERVICE, "-o", "launch.json", "--json",
    ]
    tell.command(measure)
    stage.launch_digest = str(parties.require("measure", measure).document()["launch_digest"])
    tell.did(f"settings and owner are measured: launch {stage.launch_digest[:16]}…")
    tell.command(HOST_UP)
    with tell.waiting("the guest attests"):
        reason = refusals.must_be_refused(parties.run("host-too-early", HOST_UP))
    tell.refused("no policy, no key", reason, simulated=True)
    _allow(stage)
    tell.command(HOST_UP)
    with tell.waiting("the guest attests"):
        ready = parties.start("host", HOST_UP).wait_document(lambda value: "ready" in value)
    stage.mount_kind = str(ready["mount_kind"])
    if ready["model_root"] != stage.model_root:
        raise StoryBroken("the host serves another model than the owner sealed")
    tell.did("TDX v4 quote verified by dcap-qvl, GPU report by its certificates", simulated=True)
    tell.did("report data, debug bit, measurements and launch are the policy's", simulated=True)
    tell.did("the key was released as a JWE that only this guest opens", simulated=True)
    act.simulated = True
    act.facts = {
        "refused_without_policy": reason, "launch_digest": stage.launch_digest,
        "released": recipe.KEY_ID,
    }


def _allow(stage: Stage) -> None:
    """The owner names exactly this guest in ``policy.toml``, and its resource in Rego."""
    steps = [
        ["cai", "attest", "reference", "--launch", "launch.json", "--resource", recipe.RESOURCE,
         "--unsafe-simulated-tee", "sim/platform", "-o", "policy.toml", "--rego", "release.rego"],
        ["kbs", "policy", "set-verification", "policy.toml", *stage.admin],
        ["kbs", "policy", "set", "release.rego", *stage.admin],
    ]
    for number, argv in enumerate(steps):
        stage.tell.command(argv)
        stage.parties.require(f"policy-{number}", argv)
    stage.tell.did("the policy now names exactly this guest's measurements", simulated=True)


def serve(stage: Stage, act: Act) -> None:
    """Act 4: the mount, and an engine on a Unix socket over it."""
    tell = stage.tell
    if stage.mount_point not in mounts_under(stage.work):
        raise StoryBroken("nothing is mounted although the host says so")
    if stage.mount_kind == "tmpfs":
        tell.note("/dev/fuse cannot be used here, so the model was materialised to memory (tmpfs)")
    tell.did(f"mounted read-only at mnt/ ({stage.mount_kind}), authenticated chunk by chunk")
    try:
        (stage.mount_point / "planted").write_text("x")
    except OSError:
        tell.did("writing into it fails, even for root")
    else:
        raise StoryBroken("the mount can be written to")
    command = engine_command(stage)
    tell.command(command)
    party = stage.parties.start("engine", command)
    with tell.waiting("the engine loads the weights"):
        models = asking.until_answered(party, stage.engine_socket, "/v1/models")
    name = str(models["data"][0]["id"])
    listening = refusals.tcp_listeners(party.process.pid)
    if stage.engine.kind == "reference":
        says = str(asking.over_socket(stage.engine_socket, "/health")["engine"])
        if listening:
            raise StoryBroken(f"the engine listens on TCP: {', '.join(listening)}")
        tell.did(f"{name} served by the {says}, on a Unix socket; no TCP port")
    else:
        says = "vLLM"
        tell.did(f"{name} served by {says}; its API is on a Unix socket only")
        if listening:
            reach = "loopback only" if all("loopback" in item for item in listening) else "OPEN"
            tell.note(f"its processes talk by TCP as well: {len(listening)} ports, {reach}")
    act.facts = {
        "mount": stage.mount_kind, "engine": says, "model": name, "tcp_listeners": listening,
    }


def engine_command(stage: Stage) -> list[str]:
    """The command of the chosen engine, serving the mount under the model's name."""
    socket_path = "engine/engine.sock"
    if stage.engine.kind == "vllm":
        stage.engine_socket.parent.mkdir(mode=0o700)
        return [
            stage.engine.python, "-m", "vllm.entrypoints.openai.api_server", "--model", "mnt",
            "--served-model-name", stage.model.name, "--runner", "pooling", "--uds", socket_path,
        ]
    return [
        "python", "-m", "cai.demo.engine", "--model", "mnt", "--uds", socket_path,
        "--served-model-name", stage.model.name,
    ]


def ask(stage: Stage, act: Act) -> None:
    """Act 5: the gateways, one ordinary request, and what came back."""
    tell = stage.tell
    _gateways(stage)
    tell.command(
        [f"http_proxy={stage.proxy_url}", "curl", f"{stage.service_url}/v1/embeddings",
         "-H", "content-type: application/json",
         "-d", json.dumps({"model": stage.model.name, "input": [asking.SENTENCES[0]]})]
    )
    with tell.waiting("the client verifies the guest, then asks"):
        vectors = asking.embed(
            stage.proxy_url, stage.service_url, stage.model.name, asking.SENTENCES
        )
    verdict = _client_verdict(stage)
    pairs = asking.similarities(vectors)
    tell.table(_pair_table(pairs))
    same = compare_with_plain(stage, vectors)
    tell.did(same)
    act.simulated = True
    act.facts = {
        "pairs": [pair.to_json() for pair in pairs], "plain": same, "verdict": verdict,
    }


def _client_verdict(stage: Stage) -> dict[str, Any]:
    """Show what the client's gateway found out before it sent the request."""
    verdict = asking.client_verdict(
        f"http://127.0.0.1:{stage.ports.control.number}", f"127.0.0.1:{stage.ports.service.number}"
    )
    passed = [item["name"] for item in verdict["checks"] if item["outcome"] == "pass"]
    if verdict["verdict"] != "pass" or verdict["binding"] != "session" or not verdict["simulated"]:
        raise StoryBroken("the client's verdict is not the one that the story tells")
    stage.tell.did(
        f"the client's own {len(passed)} checks passed, bound to this very session; "
        "only then was it sent", simulated=True,
    )
    stage.tell.note("what no check covers, as the verdict itself says:")
    for risk in verdict["residual_risks"]:
        stage.tell.note(f"  · {risk}")
    return verdict


def _gateways(stage: Stage) -> None:
    recipe.write_json(
        stage.work / "egress.json",
        recipe.egress(
            port=stage.ports.service.number, agent=stage.work / "run" / "channel.sock",
            engine=stage.engine_socket,
        ),
    )
    recipe.write_json(
        stage.work / "ingress.json",
        recipe.ingress(
            port=stage.ports.proxy.number, control=stage.ports.control.number,
            verify=verify(stage)
        ),
    )
    held = {
        "egress": (stage.ports.service,), "ingress": (stage.ports.proxy, stage.ports.control),
    }
    for name, ports in held.items():
        command = ["tng", "launch", "--config-file", f"{name}.json", "--json"]
        stage.tell.command(command)
        for port in ports:
            port.give()
        party = stage.parties.start(f"tng-{name}", command)
        party.wait_document(lambda value: value.get("ready") is True)
    stage.tell.did("the host's gateway and the client's gateway stand")


def verify(stage: Stage) -> dict[str, Any]:
    """What the client demands: its own policy and roots, and exactly this model and launch."""
    anchors = stage.work / "sim" / "anchors"
    return {
        "as_type": "builtin",
        "policy": str(stage.work / "policy.toml"),
        "collateral": str(anchors / "collateral"),
        "rims": str(anchors / "rims"),
        "ocsp": str(anchors / "ocsp"),
        "unsafe_simulated_root": str(anchors),
        "expect": {"model_root": stage.model_root, "launch": stage.launch_digest},
    }


def compare_with_plain(stage: Stage, vectors: list[list[float]]) -> str:
    """Compare the served embeddings with those of the unencrypted model.

    Raises:
        StoryBroken: they differ.
    """
    # Deferred: numpy, tokenizers and safetensors belong to the demo's extra.
    from cai.demo.engine import EmbeddingModel

    plain = EmbeddingModel(stage.model.directory)
    expected = [plain.embed_text(text).tolist() for text in asking.SENTENCES]
    if stage.engine.kind == "reference":
        if vectors != expected:
            raise StoryBroken("the embeddings differ from those of the unencrypted model")
        return "identical, float by float, to embedding with the unencrypted model"
    least = min(map(asking.cosine, vectors, expected))
    if least < asking.SAME_COSINE:
        raise StoryBroken(f"vLLM's embeddings differ from the plain model's (cosine {least:.4f})")
    return f"the same as embedding with the unencrypted model (cosine at least {least:.5f})"


def _pair_table(pairs: list[asking.Similarity]) -> Table:
    table = Table(box=None, padding=(0, 1), show_header=False)
    for pair in pairs:
        style = "green" if pair.related else "dim"
        table.add_row(
            Text(f"{pair.cosine:6.3f}", style=style),
            Text("█" * max(0, round(pair.cosine * 10)), style=style),
            Text(f"{pair.first} ↔ {pair.second}"),
        )
    return table
