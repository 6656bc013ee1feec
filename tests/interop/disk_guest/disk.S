# A guest that writes, reads and checks a virtio disk by polling, without interrupts, at privilege level 3.
#
# The image lies at the beginning of a firmware of 64 KiB, whose reset vector jumps to it.  See disk_guest.py for
# what it leaves in memory, and for what stands on the disk.

    .intel_syntax noprefix
    .set BASE,       0xffff0000          # the firmware's first byte
    .set GDT,        0x500               # where the table is copied to
    .set PML4,       0x1000
    .set PDPT,       0x2000
    .set DIRECTORY,  0x3000              # four of them: 4 GiB by pages of 2 MiB
    .set RING,       0x200000            # descriptors; the available ring at +0x80, the used ring at +0x1000
    .set ENTRIES,    8
    .set STATE,      0x300000
    .set HEADER,     0x400000
    .set STATUS,     0x401000
    .set TABLE,      0x600000            # u64 a block: the number of the write that it has
    .set READS,      0x680000            # u64 a page of READ: 1 + the number of the write that it shows; 0: none
    .set WRITTEN,    0x800000            # 1024 pages that writes are made from
    .set READ,       0xc00000            # 1024 pages that reads go to
    .set FACTOR,     0x9E3779B97F4A7C15

    .set S_PHASE,    0x00                # 1 begun, 2 running; 100 and more: it has given up
    .set S_DONE,     0x08                # writes that have ended
    .set S_BAD,      0x10                # words or statuses that were wrong
    .set S_BEGUN,    0x18                # the write in flight, S_DONE + 1
    .set S_BLOCK,    0x20                # ... and its block
    .set S_BLOCKS,   0x28
    .set S_DEVICE,   0x30                # address of the transport
    .set S_TURNS,    0x38                # index of the available ring
    .set S_WHERE,    0x40                # the block at which something was wrong first

    .section .text, "ax"
    .code16
    .globl _start
_start:
    cli
    mov ax, cs
    mov ds, ax
    lgdtd [gdtr - _start]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                     # far jump to 08:protected
    .long protected
    .word 0x08

    .code32
protected:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, PML4
    xor eax, eax
    mov ecx, 0x6000/4
    cld
    rep stosd
    mov dword ptr ds:[PML4], PDPT+7
    mov dword ptr ds:[PDPT], DIRECTORY+7
    mov dword ptr ds:[PDPT+8], DIRECTORY+0x1007
    mov dword ptr ds:[PDPT+16], DIRECTORY+0x2007
    mov dword ptr ds:[PDPT+24], DIRECTORY+0x3007
    mov edi, DIRECTORY
    mov eax, 0x87                        # present, writable, user, large
    mov ecx, 2048
1:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    loop 1b
    mov eax, 0x620                       # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xC0000080
    xor edx, edx
    mov eax, 0x500                       # LME, LMA
    wrmsr
    mov eax, 0x80000011
    mov cr0, eax
    mov esi, offset gdt                  # the table must be in RAM, for segments are marked as accessed
    mov edi, GDT
    mov ecx, (gdtr - gdt)/4
    rep movsd
    lgdt [gdtr_ram]
    .byte 0xea                           # far jump to 28:long_mode
    .long long_mode
    .word 0x28

    .code64
long_mode:
    mov eax, 0x10
    mov ss, eax
    mov rsp, 0x9000
    push 0x23                            # data, CPL 3
    push 0x9000
    push 0x3002                          # IOPL 3, no interrupts
    push 0x1b                            # 64-bit code, CPL 3
    mov eax, offset user
    push rax
    iretq

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff             # 08 32-bit code
    .quad 0x00cf93000000ffff             # 10 data
    .quad 0x00affb000000ffff             # 18 64-bit code, CPL 3
    .quad 0x00cff3000000ffff             # 20 data, CPL 3
    .quad 0x00af9b000000ffff             # 28 64-bit code
gdtr:
    .word gdtr - gdt - 1
    .long gdt
gdtr_ram:
    .word gdtr - gdt - 1
    .long GDT

# rbx: the transport   r8: STATE   r12: the write   r13: a block   r14: a page   r15: which write a block has
user:
    mov r8d, STATE
    mov edi, STATE
    xor eax, eax
    mov ecx, 512
    rep stosq
    mov edi, TABLE
    mov ecx, 0x100000/8
    rep stosq
    mov qword ptr [r8+S_PHASE], 1
    mov rbx, 0xfeb00000                  # QEMU's microvm: transports 512 bytes apart, the first device last
    mov ecx, 24
1:  cmp dword ptr [rbx], 0x74726976
    jne 2f
    cmp dword ptr [rbx+8], 2             # a block device
    je found
2:  add rbx, 512
    loop 1b
    mov qword ptr [r8+S_PHASE], 100
    jmp stay
found:
    mov [r8+S_DEVICE], rbx
    mov dword ptr [rbx+0x70], 0          # status: reset, then acknowledged, then driver
    mov dword ptr [rbx+0x70], 1
    mov dword ptr [rbx+0x70], 3
    mov dword ptr [rbx+0x24], 0          # driver features 0-31: flush
    mov dword ptr [rbx+0x20], 1 << 9
    mov dword ptr [rbx+0x24], 1          # 32-63: VERSION_1
    mov dword ptr [rbx+0x20], 1
    mov dword ptr [rbx+0x70], 11
    test dword ptr [rbx+0x70], 8
    jnz 1f
    mov qword ptr [r8+S_PHASE], 101
    jmp stay
1:  mov dword ptr [rbx+0x30], 0          # queue 0
    mov dword ptr [rbx+0x38], ENTRIES
    mov dword ptr [rbx+0x80], RING
    mov dword ptr [rbx+0x84], 0
    mov dword ptr [rbx+0x90], RING+0x80
    mov dword ptr [rbx+0x94], 0
    mov dword ptr [rbx+0xa0], RING+0x1000
    mov dword ptr [rbx+0xa4], 0
    mov word ptr [RING+0x80], 1          # no interrupts
    mov dword ptr [rbx+0x44], 1
    mov dword ptr [rbx+0x70], 15
    mov eax, [rbx+0x100]                 # capacity, in sectors
    shr eax, 3
    mov [r8+S_BLOCKS], rax
    mov qword ptr [r8+S_PHASE], 2

work:
    mov r12, [r8+S_DONE]
    inc r12
    imul rax, r12, 37                    # the block to be written
    xor edx, edx
    div qword ptr [r8+S_BLOCKS]
    mov r13, rdx
    imul r14, r12, 13                    # the page that it is written from
    and r14, 1023
    shl r14, 12
    add r14, WRITTEN
    mov rax, FACTOR
    xor ecx, ecx
1:  lea rdx, [rax+rcx*2]                 # word i of write n: n * (FACTOR + 2 i)
    imul rdx, r12
    mov [r14+rcx*8], rdx
    inc ecx
    cmp ecx, 512
    jb 1b
    mov [r8+S_BLOCK], r13
    mov [r8+S_BEGUN], r12
    mov eax, 1
    mov ecx, 1
    call request
    mov [TABLE+r13*8], r12
    mov [r8+S_DONE], r12
    test r12, 15
    jnz 2f
    mov eax, 4                           # a flush has no data
    xor ecx, ecx
    call request
2:  imul rax, r12, 101                   # a block to be read and checked
    xor edx, edx
    div qword ptr [r8+S_BLOCKS]
    mov r13, rdx
    imul r14, r12, 7
    and r14, 1023
    mov qword ptr [READS+r14*8], 0
    shl r14, 12
    add r14, READ
    xor eax, eax
    mov ecx, 3
    call request
    mov r15, [TABLE+r13*8]
    mov rax, FACTOR
    xor ecx, ecx
3:  lea rdx, [rax+rcx*2]
    imul rdx, r15
    cmp rdx, [r14+rcx*8]
    jne 4f
    inc ecx
    cmp ecx, 512
    jb 3b
    lea rax, [r14-READ]
    shr rax, 12
    inc r15
    mov [READS+rax*8], r15
    jmp work
4:  call wrong
    jmp work

# Do request eax (0 in, 1 out, 4 flush) for block r13 and page r14; ecx: flags of the data, 0 for none
request:
    mov [HEADER], eax
    mov dword ptr [HEADER+4], 0
    lea rdx, [r13*8]
    mov [HEADER+8], rdx
    mov byte ptr [STATUS], 0xff
    mov qword ptr [RING], HEADER
    mov dword ptr [RING+8], 16
    mov dword ptr [RING+12], 1 | 1 << 16
    mov [RING+16], r14
    mov dword ptr [RING+24], 4096
    mov word ptr [RING+28], cx
    mov word ptr [RING+30], 2
    mov qword ptr [RING+32], STATUS
    mov dword ptr [RING+40], 1
    mov dword ptr [RING+44], 2
    test ecx, ecx
    jnz 1f
    mov dword ptr [RING+12], 1 | 2 << 16 # the status follows the header
1:  mov rdx, [r8+S_TURNS]
    mov rsi, rdx
    and esi, ENTRIES-1
    mov word ptr [RING+0x84+rsi*2], 0
    inc rdx
    mov [r8+S_TURNS], rdx
    mfence
    mov [RING+0x82], dx
    mfence
    mov dword ptr [rbx+0x50], 0          # kick
2:  pause
    cmp [RING+0x1002], dx
    jne 2b
    cmp byte ptr [STATUS], 0
    jne wrong
    ret

wrong:
    cmp qword ptr [r8+S_BAD], 0
    jne 1f
    mov [r8+S_WHERE], r13
1:  inc qword ptr [r8+S_BAD]
    ret

stay:
    pause
    jmp stay
