"""What a service is to serve: regions, each with a socket, memory and access rules.

load(path)    the configuration in a TOML file
parse(data)   the same of text that is at hand already
"""

from .errors import ConfigError
from .service.config import RegionConfig, ServiceConfig
from .service.config_file import load, parse

__all__ = ["ConfigError", "RegionConfig", "ServiceConfig", "load", "parse"]
