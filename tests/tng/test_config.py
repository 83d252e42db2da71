"""The configuration: what is accepted, and that everything else is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import CaiError, SettingError
from tng.config.addresses import Endpoint, Rule, TcpUpstream, UnixUpstream
from tng.config.entries import parse
from tng.config.load import load_content, load_file
from tng.config.modes import HttpProxy, Mapping
from tng.config.notes import NoteKind
from tng.config.trust import BuiltinVerify, ServiceVerify

ONE_LINER = (
    '{"add_ingress":[{"http_proxy":{"proxy_listen":{"host":"127.0.0.1","port":41000}},'
    '"verify":{"as_addr":"http://127.0.0.1:8080/as/","policy_ids":["default"]}}]}'
)

BUILTIN: dict[str, Any] = {"as_type": "builtin", "policy": "policy.toml"}
PROXY: dict[str, Any] = {"http_proxy": {"proxy_listen": {"port": 41000}}, "verify": BUILTIN}
EGRESS: dict[str, Any] = {
    "mapping": {
        "in": {"host": "0.0.0.0", "port": 8080},
        "out": {"unix": "/run/engine.sock"},
    },
    "attest": {"aa_addr": "unix:///run/channel.sock"},
}


def ingress(**changes: Any) -> dict[str, Any]:
    return {"add_ingress": [{**copy.deepcopy(PROXY), **changes}]}


def egress(**changes: Any) -> dict[str, Any]:
    return {"add_egress": [{**copy.deepcopy(EGRESS), **changes}]}


def mapping(value: Any) -> dict[str, Any]:
    return {"add_ingress": [{"mapping": value, "verify": BUILTIN}]}


def rules(first: int, last: int, out_first: int, out_last: int) -> dict[str, Any]:
    inside = {"port": first, "port_end": last}
    outside = {"host": "a", "port": out_first, "port_end": out_last}
    return {"rules": [{"in": inside, "out": outside}]}


def test_the_common_client_command() -> None:
    (entry,) = load_content(ONE_LINER).ingress
    assert entry.mode == HttpProxy(Endpoint("127.0.0.1", 41000), ())
    assert entry.trust.verify == ServiceVerify("http://127.0.0.1:8080/as/", ("default",), ())
    assert entry.padding


def test_a_proxy_listens_on_loopback_unless_told_otherwise() -> None:
    (entry,) = parse(ingress(), where="c").ingress
    assert isinstance(entry.mode, HttpProxy)
    assert entry.mode.listen.host == "127.0.0.1"


def test_builtin_verification() -> None:
    verify = {
        **BUILTIN,
        "collateral": "/c",
        "unsafe_simulated_root": "/sim",
        "expect": {"model_root": "0a" * 32, "service": "chat"},
    }
    (entry,) = parse(ingress(verify=verify), where="c").ingress
    verified = entry.trust.verify
    assert isinstance(verified, BuiltinVerify)
    assert verified.simulated_root == Path("/sim")
    assert verified.expect.model_root == "0a" * 32
    assert verified.expect.launch == ""


def test_egress_to_a_unix_socket() -> None:
    (entry,) = parse(egress(), where="c").egress
    rule = Rule(Endpoint("0.0.0.0", 8080), (UnixUpstream(Path("/run/engine.sock")),))
    assert entry.mode == Mapping((rule,))
    assert entry.trust.attest is not None
    assert entry.trust.attest.socket == Path("/run/channel.sock")
    assert entry.unsafe == ()


def test_port_ranges_become_single_ports() -> None:
    value = {
        "rules": [
            {
                "in": {"host": "127.0.0.1", "port": 8000, "port_end": 8002},
                "out": {"host": "guest.example", "port": 9000, "port_end": 9002},
            }
        ]
    }
    (entry,) = parse(mapping(value), where="c").ingress
    assert isinstance(entry.mode, Mapping)
    ports = [(rule.listen.port, rule.targets[0].port) for rule in entry.mode.rules]
    assert ports == [(8000, 9000), (8001, 9001), (8002, 9002)]


def test_a_remote_upstream_is_unsafe_and_says_so() -> None:
    out = {"in": {"port": 1}, "out": {"host": "10.0.0.9", "port": 80}}
    with pytest.raises(SettingError, match="not of this guest"):
        parse(egress(mapping=out), where="c").require_served()
    (entry,) = parse(egress(mapping=out, unsafe_remote_upstream=True), where="c").egress
    assert entry.unsafe == ("unsafe_remote_upstream",)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_upstreams(host: str) -> None:
    out = {"in": {"port": 1}, "out": {"host": host, "port": 80}}
    (entry,) = parse(egress(mapping=out), where="c").egress
    assert isinstance(entry.mode, Mapping)
    assert entry.mode.rules[0].targets == (TcpUpstream(host, 80),)


def test_explicit_nothing_is_accepted() -> None:
    config = parse({**ingress(no_ra=False), "metric": None, "control_interface": None}, where="c")
    assert config.telemetry.control is None


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"add_ingress": [], "add_egress": []},
        {"add_ingress": None},
        {"add_ingress": {}},
        {"add_ingress": [7]},
        [],
        7,
        None,
        {"add_ingres": []},
        {**ingress(), "extra": 1},
        ingress(extra=1),
        ingress(verify=None),
        ingress(verify={}),
        ingress(verify={**BUILTIN, "polcy": "x"}),
        ingress(verify={**BUILTIN, "policy": 7}),
        ingress(verify={**BUILTIN, "as_addr": "http://a/"}),
        ingress(verify={**BUILTIN, "expect": {"model": "x"}}),
        ingress(verify={**BUILTIN, "expect": {"model_root": ""}}),
        ingress(verify={**BUILTIN, "expect": {"model_root": "AA" * 32}}),
        ingress(verify={**BUILTIN, "expect": {"launch": "aa" * 32}}),
        ingress(verify={**BUILTIN, "expect": {"service": ""}}),
        ingress(verify={**BUILTIN, "expect": []}),
        ingress(verify={**BUILTIN, "binding": "none"}),
        ingress(verify={"as_addr": "http://a/"}),
        ingress(verify={"as_addr": "http://a/", "policy_ids": "default"}),
        ingress(verify={"as_addr": "a", "policy_ids": []}),
        ingress(verify={"as_addr": "file:///x", "policy_ids": []}),
        ingress(verify={"as_addr": "http://[", "policy_ids": []}),
        ingress(verify={"as_addr": "http://a:99999/", "policy_ids": []}),
        ingress(verify={"as_addr": "http://u:p@a/", "policy_ids": []}),
        ingress(verify={"as_addr": "http://a/?x", "policy_ids": []}),
        ingress(verify={"as_addr": "http://a/", "policy_ids": [], "as_headers": {"a": 1}}),
        ingress(verify={"as_type": "built-in", "policy": "x"}),
        ingress(http_proxy={}),
        ingress(http_proxy={"proxy_listen": {}}),
        ingress(http_proxy={"proxy_listen": {"port": "41000"}}),
        ingress(http_proxy={"proxy_listen": {"port": 65536}}),
        ingress(http_proxy={"proxy_listen": {"port": -1}}),
        ingress(http_proxy={"proxy_listen": {"port": True}}),
        ingress(http_proxy={"proxy_listen": {"port": 1.5}}),
        ingress(http_proxy={"proxy_listen": {"port": 1, "hots": "a"}}),
        ingress(http_proxy={"proxy_listen": {"port": 1, "host": ""}}),
        ingress(http_proxy={"proxy_listen": {"port": 1}, "dst_filter": {}, "dst_filters": []}),
        ingress(http_proxy=[]),
        ingress(padding="none"),
        ingress(mapping={"in": {"port": 1}, "out": {"host": "a", "port": 1}}),
        {"add_ingress": [{"verify": BUILTIN}]},
        mapping({}),
        mapping({"rules": []}),
        mapping({"rules": {}}),
        mapping({"in": {"port": 1}}),
        mapping({"in": {"port": 1}, "out": {"port": 1}}),
        mapping({"in": {"port": 1}, "out": {"host": "a", "port": 0}}),
        mapping(rules(1, 3, 1, 1)),
        mapping(rules(5, 4, 1, 1)),
        mapping(rules(1, 60000, 1, 60000)),
        mapping({"rules": [{"in": {"port": 1}, "out": {"host": "a", "port": 1}}] * 2}),
        egress(attest=None),
        egress(attest={}),
        egress(attest={"aa_addr": "/run/x.sock"}),
        egress(attest={"aa_addr": "http://a"}),
        egress(mapping={"in": {"port": 1}, "out": {"unix": "relative"}}),
        egress(mapping={"in": {"port": 1}, "out": {"unix": "/x", "port": 1}}),
        egress(unsafe_remote_upstream="yes"),
        {**ingress(), "control_interface": {}},
        {**ingress(), "control_interface": {"restful": {}}},
    ],
)
def test_refused(value: Any) -> None:
    with pytest.raises(SettingError) as caught:
        parse(value, where="c")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "value",
    [
        {"add_ingress": [{"hook": {"capture_dst": {"port": 80}}, "verify": BUILTIN}]},
        {"add_ingress": [{"mapping_udp": {"in": {"port": 1}, "out": {"port": 2}}, "no_ra": True}]},
        {"add_egress": [{"hook": {}, "attest": {"aa_addr": "unix:///x"}}]},
        ingress(verify={"as_provider": "ita"}),
        ingress(verify={"as_type": "builtin"}),
        ingress(verify={**BUILTIN, "attestation_policy": {"type": "trust_all"}}),
        ingress(verify={**BUILTIN, "reference_values": []}),
        egress(attest={"aa_provider": "coco_asr", "asr_addr": "http://127.0.0.1:8006"}),
        egress(ohttp={"key": {"source": "peer_shared", "rotation_interval": 300}}),
        egress(mapping={"in": {"port": 1}, "out": {"host": "example.com", "port": 1}}),
    ],
)
def test_what_is_read_but_not_done_is_named(value: Any) -> None:
    config = parse(value, where="c")
    with pytest.raises(SettingError) as caught:
        config.require_served()
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (ingress(http_proxy={"proxy_listen": {"port": 1}, "filters": []}), NoteKind.IGNORED),
        (ingress(verify={"as_addr": "http://a/", "policy_ids": [], "x": 1}), NoteKind.IGNORED),
        (egress(attest={"aa_addr": "unix:///x", "as_is_grpc": True}), NoteKind.IGNORED),
        ({**ingress(), "admin_bind": {"port": 1}}, NoteKind.IGNORED),
        ({"add_ingress": [{**PROXY, "verify": None, "no_ra": True}]}, NoteKind.CLEAR),
        (egress(direct_forward=[{"http_path": "/health"}]), NoteKind.CLEAR),
        (
            ingress(http_proxy={"proxy_listen": {"port": 1}, "on_mismatch": "direct"}),
            NoteKind.CLEAR,
        ),
        (
            ingress(http_proxy={"proxy_listen": {"port": 1}, "dst_filters": [{"domain": "a"}]}),
            NoteKind.VERSION,
        ),
        (ingress(http_proxy={"proxy_listen": {"port": 1}, "dst_filters": [{}]}), NoteKind.VERSION),
        (mapping({"in": {"port": 1}, "out": {"host": "a", "port": 1}}),
         NoteKind.VERSION),
    ],
)  # fmt: skip
def test_what_has_another_effect_than_it_seems_is_told(value: Any, kind: NoteKind) -> None:
    assert kind in {note.kind for note in parse(value, where="c").notes}


def test_a_misspelt_key_gets_a_suggestion() -> None:
    with pytest.raises(SettingError) as caught:
        parse(ingress(http_proxy={"proxy_listn": {"port": 1}}), where="c")
    with pytest.raises(SettingError) as second:
        parse(ingress(verify={**BUILTIN, "colateral": "x"}), where="c")
    assert caught.value.hint
    assert "collateral" in (second.value.hint or "")
    ignored = ingress(http_proxy={"proxy_listen": {"port": 1}, "dst_filter_": []})
    texts = [str(note) for note in parse(ignored, where="c").notes]
    assert any("did you mean 'dst_filter'" in text for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"add_ingress": [], "add_ingress": []}',
        '{"add_ingress": NaN}',
        '{"a": 1} x',
        "\ud800",
        "[" * 100_000,
        " " * (1024 * 1024 + 1),
    ],
)
def test_content_that_is_no_configuration(text: str) -> None:
    with pytest.raises(CaiError) as caught:
        load_content(text)
    assert caught.value.exit_status in (2, 3)


def test_yaml_by_suffix(tmp_path: Path) -> None:
    file = tmp_path / "tng.yaml"
    file.write_text(
        "add_ingress:\n- http_proxy: {proxy_listen: {port: 41000}}\n"
        "  verify: {as_type: builtin, policy: p.toml}\n"
    )
    assert len(load_file(file).ingress) == 1


@pytest.mark.parametrize(
    "text",
    [
        "add_ingress: []\nadd_ingress: []\n",
        "a: &x [1]\nb: *x\n",
        "a: !!python/object/apply:os.system [id]\n",
        "? [1]\n: 2\n",
        "a: 2026-01-01x: y\n",
        "<<: {add_ingress: []}\n",
        "1: 2\n",
        "a: [\n",
        "\x00",
        "- - - -\n",
        "",
        "add_ingress: 2026-01-01\n",
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tng.yml"
    file.write_text(text)
    with pytest.raises(SettingError):
        load_file(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CaiError) as caught:
        load_file(tmp_path / "none.json")
    assert caught.value.exit_status == 3


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["add_ingress", "add_egress", "http_proxy", "mapping", "verify", "attest", "in", "out",
             "host", "port", "port_end", "unix", "rules", "aa_addr", "proxy_listen", "as_addr",
             "policy_ids", "as_type", "policy", "expect", "dst_filters", "control_interface",
             "restful", "x"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@given(values)
def test_no_value_raises_anything_but_our_errors(value: Any) -> None:
    try:
        parse(value, where="c")
    except CaiError:
        return
