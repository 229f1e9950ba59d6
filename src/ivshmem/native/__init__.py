"""Internal: system calls at C speed: descriptors, messages, mappings, spinning, one doorbell."""
