"""Internal: what QEMU and libvirt have to be told, and a running QEMU over QMP."""
