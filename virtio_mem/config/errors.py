"""The one exception of a configuration that can't be right."""

from __future__ import annotations

from vhost_user.errors import UsageError


class ConfigError(UsageError):
    """An option's mistake, whether it came as text or as keyword arguments.

    `field` names the option as one finds it on the command line, with the identifier where there are several:
    "--memory-zone id=mem0 hotplugged_size". `value` is what was written there, in the option's own syntax, or None
    where nothing was written.
    """

    def __str__(self) -> str:
        if self.value is not None:
            return super().__str__()
        text = f"{self.field}: {self.limit}"
        return f"{text}; {self.remedy}" if self.remedy else text
