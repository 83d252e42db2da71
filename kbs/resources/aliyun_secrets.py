"""Resources that Alibaba Cloud KMS keeps as secrets."""

from __future__ import annotations

from cai.settings import Section
from kbs.keys.aliyun import Kms, open_kms, secret_or_none
from kbs.names import ResourceName
from kbs.resources.external import Naming, SourceSecret, secret_name


class AliyunSecrets:
    """Reads secrets of KMS.

    Args:
        kms: the way in.
        naming: by the tag alone, as Trustee does, or by the whole path.
        label: names the place in listings: an instance or an endpoint.
    """

    def __init__(self, kms: Kms, *, naming: Naming, label: str) -> None:
        self.id = f"aliyun-kms-secrets:{label}"
        self._kms = kms
        self._naming = naming

    @classmethod
    def from_section(cls, section: Section) -> AliyunSecrets:
        """Read a source of kind ``aliyun-kms``.

        Raises:
            SettingError: a member is missing or of another form.
        """
        label = section.text("instance", "") or section.text("endpoint", "")
        return cls(open_kms(section), naming=Naming.from_section(section), label=label)

    def read(self, name: ResourceName) -> SourceSecret | None:
        """See ``SecretSource``."""
        found = secret_or_none(self._kms, secret_name(name, self._naming), source=self.id)
        return None if found is None else SourceSecret(found.contents, found.version)

    def close(self) -> None:
        """Close the way in."""
        self._kms.close()
