"""The configuration of a service: regions, each with a socket, memory and access rules.

load(path)    return the configuration in a TOML file
parse(data)   do the same for data that was read before
"""

from .errors import ConfigError
from .service.config import RegionConfig, ServiceConfig
from .service.config_file import load, parse

__all__ = ["ConfigError", "RegionConfig", "ServiceConfig", "load", "parse"]
