// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * A UIO driver for QEMU's ivshmem device, for the tests: stock kernels have none.
 *
 * Map 0 is BAR0, the registers; map 1 is BAR2, the memory. Both are claimed, as drivers do.
 * An interrupt of any vector counts as one of the UIO device, as UIO has one for each device.
 */
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/uio_driver.h>

#define REGISTERS 0
#define MEMORY 2
#define MOST_VECTORS 2048

static irqreturn_t rung(int irq, void *info)
{
	uio_event_notify(info);
	return IRQ_HANDLED;
}

/* UIO refuses an interrupt number of 0, and with UIO_IRQ_CUSTOM leaves requesting to us. */
static int listen(struct pci_dev *pci, struct uio_info *info)
{
	int vector, error, count = pci_alloc_irq_vectors(pci, 1, MOST_VECTORS, PCI_IRQ_MSIX);

	if (count < 0) {
		info->irq = UIO_IRQ_NONE; /* ivshmem-plain has no interrupts */
		return 0;
	}
	info->irq = UIO_IRQ_CUSTOM;
	for (vector = 0; vector < count; vector++) {
		error = devm_request_irq(&pci->dev, pci_irq_vector(pci, vector), rung, 0,
					 KBUILD_MODNAME, info);
		if (error)
			return error;
	}
	pci_set_master(pci);
	return 0;
}

static void show(struct pci_dev *pci, struct uio_mem *map, int bar, const char *name)
{
	map->name = name;
	map->memtype = UIO_MEM_PHYS;
	map->addr = pci_resource_start(pci, bar);
	map->size = PAGE_ALIGN(pci_resource_len(pci, bar)); /* UIO maps no part of a page */
}

static int probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct uio_info *info = devm_kzalloc(&pci->dev, sizeof(*info), GFP_KERNEL);
	int error;

	if (!info)
		return -ENOMEM;
	error = pcim_enable_device(pci);
	if (error)
		return error;
	error = pcim_iomap_regions(pci, BIT(REGISTERS), KBUILD_MODNAME);
	if (error)
		return error;
	error = pci_request_region(pci, MEMORY, KBUILD_MODNAME);
	if (error)
		return error;
	info->name = KBUILD_MODNAME;
	info->version = "1";
	show(pci, &info->mem[0], REGISTERS, "registers");
	show(pci, &info->mem[1], MEMORY, "memory");
	pci_set_drvdata(pci, info);
	error = listen(pci, info);
	return error ? error : uio_register_device(&pci->dev, info);
}

static void leave(struct pci_dev *pci)
{
	struct uio_info *info = pci_get_drvdata(pci);
	int vector;

	/* First the interrupts, which would look for what uio_unregister_device() frees. */
	if (info->irq == UIO_IRQ_CUSTOM)
		for (vector = 0; pci_irq_vector(pci, vector) >= 0; vector++)
			devm_free_irq(&pci->dev, pci_irq_vector(pci, vector), info);
	uio_unregister_device(info);
}

static const struct pci_device_id ids[] = { { PCI_DEVICE(0x1af4, 0x1110) }, {} };
MODULE_DEVICE_TABLE(pci, ids);

static struct pci_driver uio_doorbell = {
	.name = KBUILD_MODNAME,
	.id_table = ids,
	.probe = probe,
	.remove = leave,
};
module_pci_driver(uio_doorbell);

MODULE_DESCRIPTION("UIO driver for QEMU's ivshmem device");
MODULE_LICENSE("Dual MIT/GPL");
