# The boot sector: loads measure.bin from the sectors behind it to 0x10000 and enters it in 64-bit mode.
#
# Only for a machine that boots from a disk (QEMU).  Identity map of the first 4 GiB by 2 MiB pages
# with the user bit, tables in 0x1000-0x6fff, interrupts off.

    .intel_syntax noprefix
    .set LOAD,      0x10000
    .set PML4,      0x1000
    .set PDPT,      0x2000
    .set DIRECTORY, 0x3000

    .section .text, "ax"
    .code16
    .globl _boot
_boot:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    mov si, offset packet
    mov ah, 0x42                # read the sectors that the packet names
    int 0x13
    jc fail
    in al, 0x92                 # A20 on
    or al, 2
    out 0x92, al
    mov di, PML4
    xor eax, eax
    mov cx, 0x6000/4
    rep stosd
    mov dword ptr ds:[PML4], PDPT+7
    mov dword ptr ds:[PDPT], DIRECTORY+7
    mov dword ptr ds:[PDPT+8], DIRECTORY+0x1007
    mov dword ptr ds:[PDPT+16], DIRECTORY+0x2007
    mov dword ptr ds:[PDPT+24], DIRECTORY+0x3007
    mov di, DIRECTORY
    mov eax, 0x87               # present, writable, user, large
    mov cx, 2048
1:  mov [di], eax
    add eax, 0x200000
    add di, 8
    loop 1b
    mov eax, 0x620              # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x900               # LME, NXE
    wrmsr
    lgdt gdtr
    mov eax, cr0
    or eax, 0x80050033          # PG AM WP NE ET MP PE
    and eax, 0x9fffffff         # caches on
    mov cr0, eax
    .byte 0x66, 0xea            # far jump to 0x08:long_mode
    .long long_mode
    .word 0x08
fail:
    mov ax, 0x0e45
    int 0x10
    hlt
    jmp fail

    .balign 4
packet:
    .byte 16, 0
    .word 16                    # sectors
    .word 0x0000, 0x1000        # to 1000:0000
    .quad 1                     # from the one behind this
    .balign 8
gdt: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdtr: .word 23
    .long gdt

    .code64
long_mode:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, LOAD
    jmp rax
    .org 510
    .word 0xaa55
