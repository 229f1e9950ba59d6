#!/bin/sh
# Start a virtual machine on this terminal: vm.sh NAME SIDE [more arguments for QEMU]
# It needs disk.ext2, kernel, initrd and ivshmem.iso in this directory.
set -e
name=$1 side=$2
shift 2
# The machine writes into a file of its own, which QEMUs at both sides of a migration open.
[ -e "$name.qcow2" ] || qemu-img create -q -f qcow2 -F raw -b disk.ext2 "$name.qcow2"
exec qemu-system-x86_64 -name "$name" -nodefaults -nographic -serial mon:stdio \
    -accel kvm -accel tcg -cpu max -m 512M \
    -machine q35,kernel-irqchip=split -device intel-iommu,intremap=on \
    -device pcie-root-port,id=port1,chassis=1 \
    -drive "file=$name.qcow2,if=virtio" \
    -drive file=ivshmem.iso,if=virtio,format=raw,readonly=on \
    -kernel kernel -initrd initrd \
    -append "root=/dev/vda rw console=ttyS0 quiet intel_iommu=on systemd.hostname=$name" \
    -qmp "unix:$name-$side.qmp,server=on,wait=off" "$@"
