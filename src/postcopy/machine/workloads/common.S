# What all workloads share: the layout (see README.md), filling the slice, one timed visit of a page.
#
# Registers, from `begin` on:
#   r8  record of this vCPU      r9  first page of its slice    r10 pages it visits (hot set)
#   r12 number of the next page  r13 random state (xorshift64)  r14 TSC at the end of the last visit
#   r15 iterations               rbp number of this vCPU

    .intel_syntax noprefix
    .code64
    .set LOAD,           0x10000
    .set RECORDS,        0x20000
    .set RECORD_SHIFT,   13              # 8 KiB a vCPU

    .set R_MAGIC,        0x00
    .set R_PHASE,        0x08            # 1 filling, 2 running, 3 done
    .set R_ITERATIONS,   0x10
    .set R_WRITES,       0x18
    .set R_BEGUN,        0x20            # writes + 1 while one is in flight
    .set R_TARGET,       0x28            # ... to this page
    .set R_EXPECTED,     0x30            # ... whose counter was this before
    .set R_LAST,         0x38            # TSC at the end of the last visit
    .set R_START,        0x40            # TSC when the slice was filled
    .set R_MAX_GAP,      0x48
    .set R_MAX_GAP_AT,   0x50
    .set R_MAX_LAT,      0x58
    .set R_MAX_LAT_AT,   0x60
    .set R_SUM_LAT,      0x68
    .set R_PASSES,       0x70
    .set R_CONTROL,      0x78            # the host writes 1: forget statistics; answered by 0
    .set R_GAPS,         0x200           # 64 octaves
    .set R_LATENCIES,    0x1000          # 64 octaves of 8

    .section .text, "ax"
    .globl _start
_start:
    jmp begin
    .org 0x10
    NAME                                 # 8 characters, each workload its own
    .org 0x40
params:
    .ascii "PCYWRK01"
P_VCPUS:      .quad 1
P_BASE:       .quad 0x200000
P_SLICE:      .quad 0x100000             # bytes a vCPU
P_HOT:        .quad 0x80000              # bytes a vCPU, from the beginning of its slice
P_SEED:       .quad 0x9E3779B97F4A7C15
P_DELAY:      .quad 0                    # least TSC cycles from one visit to the next
P_FLAGS:      .quad 0                    # 1: vCPU 0 says R on the serial port when it runs
P_EXIT_AFTER: .quad 0                    # vCPU 0 switches the machine off after that many visits
P_MEMORY:     .quad 0
P_DEVICE:     .quad 0                    # of `disk` and `net`: the device's registers
P_AREA:       .quad 0                    # ... its ring, records and buffers
P_BLOCKS:     .quad 0                    # ... blocks of 4096 bytes that it uses
P_BUFFERS:    .quad 0                    # ... pages
    .org 0x140

# rax = TSC; rdx is lost
    .macro NOW
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    .endm

# rax = mix(rax); rdx is lost; r10, r11 hold the factors
    .macro MIX
    mov rdx, rax
    shr rdx, 30
    xor rax, rdx
    imul rax, r10
    mov rdx, rax
    shr rdx, 27
    xor rax, rdx
    imul rax, r11
    mov rdx, rax
    shr rdx, 31
    xor rax, rdx
    .endm

# One step of xorshift64 in r13; rax is lost
    .macro RANDOM
    mov rax, r13
    shl rax, 13
    xor r13, rax
    mov rax, r13
    shr rax, 7
    xor r13, rax
    mov rax, r13
    shl rax, 17
    xor r13, rax
    .endm

# Wait until P_DELAY cycles have passed since the last visit
    .macro PACE
    cmp qword ptr [rip+P_DELAY], 0
    je 2f
1:  pause
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, r14
    cmp rax, [rip+P_DELAY]
    jb 1b
2:
    .endm

# Count one visit that began at rdi and ended at rax (TSC)
    .macro RECORD
    mov rcx, rax
    sub rcx, rdi                         # latency
    mov rsi, rax
    sub rsi, r14                         # gap: end of the last visit to end of this one
    mov r14, rax
    inc r15
    mov [r8+R_ITERATIONS], r15
    mov [r8+R_LAST], rax
    add [r8+R_SUM_LAT], rcx
    cmp rsi, [r8+R_MAX_GAP]
    jbe 1f
    mov [r8+R_MAX_GAP], rsi
    mov [r8+R_MAX_GAP_AT], rax
1:  cmp rcx, [r8+R_MAX_LAT]
    jbe 2f
    mov [r8+R_MAX_LAT], rcx
    mov [r8+R_MAX_LAT_AT], rax
2:  or rsi, 1
    bsr rax, rsi
    inc qword ptr [r8+rax*8+R_GAPS]
    mov rdi, rcx
    or rdi, 8
    bsr rax, rdi
    mov ecx, eax
    sub ecx, 3
    shr rdi, cl
    and edi, 7
    lea rdi, [rdi+rax*8]
    inc qword ptr [r8+rdi*8+R_LATENCIES]
    cmp qword ptr [r8+R_CONTROL], 0
    je 3f
    call forget
3:  cmp r15, [rip+P_EXIT_AFTER]
    jne 4f
    test rbp, rbp
    jnz 4f
    call finish
4:
    .endm

# Add one to the counter of page rbx, timed, so that a stop at any instruction can be told exactly
    .macro WRITE_PAGE
    NOW
    mov rdi, rax
    mov rcx, [rbx]
    mov [r8+R_TARGET], rbx
    mov [r8+R_EXPECTED], rcx
    mov rax, [r8+R_WRITES]
    inc rax
    mov [r8+R_BEGUN], rax
    inc rcx
    mov [rbx], rcx
    mov [r8+R_WRITES], rax
    NOW
    .endm

begin:
    cld
    mov rbp, rdi
    mov r8, rdi
    shl r8, RECORD_SHIFT
    add r8, RECORDS
    mov rdi, r8
    mov ecx, 1024
    xor eax, eax
    rep stosq
    mov rax, 0x31304345525F4350          # "PC_REC01"
    mov [r8+R_MAGIC], rax
    mov qword ptr [r8+R_PHASE], 1
    mov r9, [rip+P_SLICE]
    imul r9, rbp
    add r9, [rip+P_BASE]
    call fill
    .ifdef HAS_PREPARE
    call prepare
    .endif
    mov r10, [rip+P_HOT]
    shr r10, 12
    # A random state of its own for each vCPU, never 0
    mov r13, [rip+P_SEED]
    lea rax, [rbp+1]
    imul r13, rax
    or r13, 1
    xor r15d, r15d
    mov r12, -1
    test rbp, rbp
    jnz 1f
    test qword ptr [rip+P_FLAGS], 1
    jz 1f
    mov edx, 0x3f8
    mov al, 'R'
    out dx, al
1:  NOW
    mov [r8+R_START], rax
    mov [r8+R_LAST], rax
    mov r14, rax
    mov qword ptr [r8+R_PHASE], 2
    jmp work

# Word at address a of the slice = mix(page of a + seed) ^ mix(a within its page), but the first word
# of each page is its counter
fill:
    mov rdi, r9
    mov r12, [rip+P_SLICE]
    add r12, r9
    mov r10, 0xBF58476D1CE4E5B9
    mov r11, 0x94D049BB133111EB
1:  cmp rdi, r12
    jae 3f
    mov rax, [rip+P_SEED]
    add rax, rdi
    MIX
    mov rbx, rax
    mov qword ptr [rdi], 0
    mov ecx, 8
2:  mov rax, rcx
    MIX
    xor rax, rbx
    mov [rdi+rcx], rax
    add ecx, 8
    cmp ecx, 4096
    jb 2b
    add rdi, 4096
    jmp 1b
3:  ret

forget:
    xor eax, eax
    lea rdi, [r8+R_GAPS]
    mov ecx, 64
    rep stosq
    lea rdi, [r8+R_LATENCIES]
    mov ecx, 512
    rep stosq
    mov [r8+R_MAX_GAP], rax
    mov [r8+R_MAX_GAP_AT], rax
    mov [r8+R_MAX_LAT], rax
    mov [r8+R_MAX_LAT_AT], rax
    mov [r8+R_SUM_LAT], rax
    mov [r8+R_CONTROL], rax
    NOW
    mov r14, rax
    ret

# Switch the machine off; should it be let run all the same, wait here
finish:
    mov qword ptr [r8+R_PHASE], 3
    mov al, 0
    out 0xf4, al
1:  pause
    jmp 1b
