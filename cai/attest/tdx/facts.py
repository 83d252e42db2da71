"""What a verified TDX quote says, under the names that Trustee gives its claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cai.attest.tdx.quote import BODY_LAYOUT, HEADER_LAYOUT
from cai.errors import FormatError
from cai.jcs import MAX_INTEGER
from cai.settings import Section


@dataclass(frozen=True, slots=True)
class TdxFacts:
    """What a verified TDX quote says; byte fields in lower-case hex, named as Trustee's claims.

    Attributes:
        header: version, att_key_type, tee_type, reserved, vendor_id, user_data.
        body: tcb_svn, mr_seam, mrsigner_seam, seam_attributes, td_attributes, xfam, mr_td,
            mr_config_id, mr_owner, mr_owner_config, rtmr_0 to rtmr_3, report_data; with a TD 1.5
            body also tee_tcb_svn2 and mr_service_td.
        debug: the TD can be debugged; always false, since no policy lifts that check.
        tcb_status: Intel's status of platform, module and quoting enclave together.
        tcb_date: RFC 3339 date of the TCB recovery that the platform satisfies.
        advisory_ids: Intel's advisories for this TCB level, sorted.
        fmspc: platform family, 12 hex digits.
        ppid: identity of the processor package, 32 hex digits.
        eval_data_number: generation of the TCB information used.
        collateral_expires: RFC 3339 time at which the first part of the collateral expires.
        collateral_issued: RFC 3339 time at which Intel signed the older of TCB information and
            QE identity.
        platform_instance_id: identity of the platform as registered with Intel; empty if none.
        pck_flags: ``dynamic_platform``, ``cached_keys``, ``smt_enabled``: true, false, undefined.
        engines: the verification engines that said all of this.
    """

    header: Mapping[str, str]
    body: Mapping[str, str]
    debug: bool
    tcb_status: str
    tcb_date: str
    advisory_ids: tuple[str, ...]
    fmspc: str
    ppid: str
    eval_data_number: int
    collateral_expires: str
    platform_instance_id: str = ""
    pck_flags: Mapping[str, str] = field(default_factory=dict)
    collateral_issued: str = ""
    engines: tuple[str, ...] = ("dcap-qvl",)

    def attribute(self, bit: int) -> bool:
        """One bit of td_attributes (a 64-bit little-endian integer)."""
        value = int.from_bytes(bytes.fromhex(self.body["td_attributes"]), "little")
        return bool(value >> bit & 1)

    def claims(self) -> dict[str, object]:
        """The facts as Trustee's ``tdx`` claims."""
        return {
            "quote": {"header": dict(self.header), "body": dict(self.body)},
            "td_attributes": {
                "debug": self.debug,
                "septve_disable": self.attribute(28),
                "protection_keys": self.attribute(30),
                "key_locker": self.attribute(31),
                "perfmon": self.attribute(63),
            },
            "tcb_status": self.tcb_status,
            "tcb_date": self.tcb_date,
            "advisory_ids": list(self.advisory_ids),
            # Expired collateral never verifies here; Trustee spells "fresh" as the string "0".
            "collateral_expiration_status": "0",
            "earliest_expiration_date": self.collateral_expires,
            "earliest_issue_date": self.collateral_issued,
            "tcb_eval_num": self.eval_data_number,
            "fmspc": self.fmspc,
            "ppid": self.ppid,
            "platform_instance_id": self.platform_instance_id,
            "is_dynamic_platform": self.pck_flags.get("dynamic_platform", "undefined"),
            "is_cached_keys": self.pck_flags.get("cached_keys", "undefined"),
            "is_smt_enabled": self.pck_flags.get("smt_enabled", "undefined"),
        }

    @classmethod
    def parse(cls, section: Section) -> TdxFacts:
        """Read what ``asdict`` wrote, strictly.

        Raises:
            FormatError, SettingError: a member is missing, unknown or of another form.
        """
        facts = cls(
            header=_layout(section, "header", (HEADER_LAYOUT,)),
            body=_layout(section, "body", tuple(BODY_LAYOUT.values())),
            debug=section.flag("debug"),
            tcb_status=section.text("tcb_status"),
            tcb_date=section.text("tcb_date"),
            advisory_ids=tuple(section.texts("advisory_ids")),
            fmspc=section.text("fmspc"),
            ppid=section.text("ppid"),
            eval_data_number=section.integer(
                "eval_data_number", least=0, most=MAX_INTEGER, unit="generations"
            ),
            collateral_expires=section.text("collateral_expires"),
            platform_instance_id=section.text("platform_instance_id"),
            pck_flags=texts_by_name(section, "pck_flags"),
            collateral_issued=section.text("collateral_issued"),
            engines=tuple(section.texts("engines")),
        )
        section.finish()
        return facts


def _layout(
    section: Section, name: str, layouts: tuple[tuple[tuple[str, int], ...], ...]
) -> dict[str, str]:
    """Hex fields that are exactly those of one of the layouts."""
    fields = texts_by_name(section, name)
    for layout in layouts:
        if fields.keys() == dict(layout).keys() and all(
            len(fields[part]) == 2 * size and set(fields[part]) <= set("0123456789abcdef")
            for part, size in layout
        ):
            return fields
    raise FormatError(f"{section.where}: {name} does not have the fields of a quote")


def texts_by_name(section: Section, name: str) -> dict[str, str]:
    """A member that maps names to strings.

    Raises:
        FormatError: it does not.
    """
    value = section.raw(name)
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{section.where}: {name} must map names to strings")
    return dict(value)
