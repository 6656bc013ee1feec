"""Which pages the guest has written: by the kernel's page tables, or by KVM's log."""
