# The measuring guest: touches one page an iteration, times every access by RDTSC, keeps the records in
# its own memory.  README.md beside this file has the layout.
#
# Flat 64-bit code; enter at LOAD with identity page tables (user bit set) and interrupts off, at
# privilege level 0 (then it goes down to 3 by itself) or 3.  No device, no interrupt, no stack needed.
#
# Registers in the loop:
#   r8  parameters and state    r9  first page of the hot set   r10 its pages     r11 stride
#   r12 number of the page      r13 random state (xorshift64)   r14 TSC at the end of the last access
#   r15 iterations

    .intel_syntax noprefix
    .set LOAD,    0x10000
    .set PARAM,   0x7000
    .set LATH,    0x8000            # access latency: 64 octaves of 8 parts
# --- parameters (u64 each), offsets from 0x7000
    .set P_MAGIC, 0x00
    .set P_FLAGS, 0x08          # bit0: fill the working set with random data (else leave as is, counters zeroed)
    .set P_BASE,  0x10
    .set P_SIZE,  0x18
    .set P_STRIDE,0x20
    .set P_MODE,  0x28          # 0 sequential, 1 random (xorshift64)          (live)
    .set P_WFRAC, 0x30          # of 256 visits how many write: 256 all, 0 none  (live)
    .set P_TOUCH, 0x38          # counter increments per writing visit, >=1      (live)
    .set P_DELAY, 0x40          # least TSC cycles between iteration starts      (live)
    .set P_SEED,  0x48
    .set P_FBASE, 0x50          # static random fill
    .set P_FSIZE, 0x58
    .set P_THRESH,0x60          # event threshold, cycles                        (live)
    .set P_SINT,  0x68          # series interval, cycles                        (live)
    .set P_EBASE, 0x70          # event ring: 32 bytes each
    .set P_ECAP,  0x78          # entries, power of two
    .set P_SBASE, 0x80          # series ring: 32 bytes each
    .set P_SCAP,  0x88          # entries, power of two
    .set P_MAXIT, 0x90          # stop after that many iterations (0: never)
    .set P_PORT,  0x98          # bit0: 'R' to COM1 when running; bit1: OUT 0xf4 when done
# --- state
    .set S_MAGIC, 0x100
    .set S_PHASE, 0x108         # 1 filling, 2 running, 3 done
    .set S_ITER,  0x110
    .set S_WRITES,0x118
    .set S_PASSES,0x120
    .set S_LAST,  0x128         # TSC at the end of the last access
    .set S_START, 0x130         # TSC at the first iteration
    .set S_MAXGAP,0x138
    .set S_MAXGAPT,0x140
    .set S_MAXLAT,0x148
    .set S_MAXLATT,0x150
    .set S_EVENTS,0x158         # total ever, index = total & (cap-1)
    .set S_SERIES,0x160
    .set S_SUMLAT,0x168
    .set S_SNEXT, 0x170
    .set S_SMAXG, 0x178
    .set S_SMAXL, 0x180
    .set S_DNEXT, 0x188
    .set S_CTRL,  0x190         # host writes 1: reset statistics, 2: stop; guest acks with 0
    .set S_ENTRY, 0x198         # TSC at payload entry
    .set S_FILLED,0x1a0         # TSC when the fill was done
    .set GAPH,    0x200         # 64 x u64, log2(gap)

    .section .text, "ax"
    .code64
    .globl _payload
_payload:
    jmp start
    .org 0x10
    .ascii "PCYBIMG1"           # image magic
    .quad LOAD
    .quad payload_end - _payload
    .quad params - _payload
    .org 0x40
params:
    .ascii "PCYBPAR1"           # P_MAGIC
    .quad 1                     # flags
    .quad 0x1000000             # base 16 MiB
    .quad 0x4000000             # size 64 MiB
    .quad 4096
    .quad 0                     # sequential
    .quad 256                   # all writes
    .quad 1
    .quad 0                     # no delay
    .quad 0x9E3779B97F4A7C15    # seed
    .quad 0, 0                  # static fill
    .quad 26000                 # ~10 us at 2.6 GHz
    .quad 26000000              # ~10 ms
    .quad 0x100000, 262144      # event ring 8 MiB at 1 MiB
    .quad 0x20000, 8192         # series ring 256 KiB at 128 KiB
    .quad 0
    .quad 0
    .org 0x140
start:
    cld
    mov eax, cs
    test al, 3
    jnz user
    # Level 0 may be emulated (KVM inside a VM without VMX), hundreds of times slower: go to level 3,
    # I/O privilege 3, interrupts off.
    cli
    mov esp, 0xf000
    lgdt [rip+gdtr64]
    push 0x1b
    push 0xf000
    push 0x3002
    push 0x23
    lea rax, [rip+user]
    push rax
    iretq
    .balign 8
gdt64: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff, 0x00cff2000000ffff, 0x00affa000000ffff
gdtr64: .word 39
    .quad gdt64
user:
    mov eax, 0x1b
    mov ds, eax
    mov es, eax
    mov esp, 0xf000
    lea rsi, [rip+params]
    mov edi, PARAM
    mov ecx, 32
    rep movsq
    xor eax, eax
    mov edi, PARAM+0x100
    mov ecx, (0xc00-0x100)/8
    rep stosq
    mov edi, LATH
    mov ecx, 512
    rep stosq
    mov r8d, PARAM
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov [r8+S_ENTRY], rax
    mov rax, 0x3141545342594350  # "PCYBSTA1"
    mov [r8+S_MAGIC], rax
    mov qword ptr [r8+S_PHASE], 1
    # static fill, then the working set
    mov rdi, [r8+P_FBASE]
    mov rcx, [r8+P_FSIZE]
    call fill
    test qword ptr [r8+P_FLAGS], 1
    jz 1f
    mov rdi, [r8+P_BASE]
    mov rcx, [r8+P_SIZE]
    call fill
1:  mov r9, [r8+P_BASE]
    mov r11, [r8+P_STRIDE]
    mov rax, [r8+P_SIZE]
    xor edx, edx
    div r11
    mov r10, rax                # number of pages
    mov rbx, r9
    mov rcx, r10
    xor eax, eax
2:  mov [rbx], rax
    add rbx, r11
    dec rcx
    jnz 2b
    mov r13, [r8+P_SEED]
    or r13, 1
    xor r15, r15
    mov r12, -1
    test qword ptr [r8+P_PORT], 1
    jz 3f
    mov dx, 0x3f8
    mov al, 'R'
    out dx, al
3:  rdtsc
    shl rdx, 32
    or rax, rdx
    mov [r8+S_START], rax
    mov [r8+S_FILLED], rax
    mov [r8+S_LAST], rax
    mov r14, rax
    add rax, [r8+P_SINT]
    mov [r8+S_SNEXT], rax
    mov qword ptr [r8+S_PHASE], 2
    .balign 64
loop:
    cmp qword ptr [r8+S_CTRL], 0
    jne control
    # next page; the generator runs in both modes (it also draws read/write)
    mov rax, r13
    shl rax, 13
    xor r13, rax
    mov rax, r13
    shr rax, 7
    xor r13, rax
    mov rax, r13
    shl rax, 17
    xor r13, rax
    cmp qword ptr [r8+P_MODE], 0
    jne 1f
    inc r12
    cmp r12, r10
    jb 2f
    xor r12d, r12d
    inc qword ptr [r8+S_PASSES]
    jmp 2f
1:  mov rax, r13
    mul r10
    mov r12, rdx
2:  mov rbx, r12
    imul rbx, r11
    add rbx, r9
    # read or write
    movzx eax, r13b
    xor ecx, ecx
    cmp rax, [r8+P_WFRAC]
    jae 3f
    mov rcx, [r8+P_TOUCH]
3:  mov rbp, rcx
    # pace
    mov rdi, [r8+P_DELAY]
    test rdi, rdi
    jz 5f
4:  rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, [r8+S_DNEXT]
    jb 4b
    add rax, rdi
    mov [r8+S_DNEXT], rax
5:  lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rdi, rax                # t0
    test rcx, rcx
    jz 7f
6:  inc qword ptr [rbx]
    dec rcx
    jnz 6b
    jmp 8f
7:  mov rdx, [rbx]
8:  lfence
    rdtsc
    shl rdx, 32
    or rax, rdx                 # t1
    mov rdx, rax
    sub rdx, rdi                # latency
    mov rsi, rax
    sub rsi, r14                # gap
    mov r14, rax
    inc r15
    mov [r8+S_ITER], r15
    mov [r8+S_LAST], rax
    add [r8+S_WRITES], rbp
    add [r8+S_SUMLAT], rdx
    mov rdi, rdx
    or rdi, 8
    bsr rcx, rdi
    mov rbp, rcx
    sub ecx, 3
    shr rdi, cl
    and edi, 7
    lea rdi, [rdi+rbp*8]
    inc qword ptr [rdi*8+LATH]
    mov rdi, rsi
    or rdi, 1
    bsr rbp, rdi
    inc qword ptr [r8+rbp*8+GAPH]
    cmp rsi, [r8+S_MAXGAP]
    jbe 1f
    mov [r8+S_MAXGAP], rsi
    mov [r8+S_MAXGAPT], rax
1:  cmp rdx, [r8+S_MAXLAT]
    jbe 2f
    mov [r8+S_MAXLAT], rdx
    mov [r8+S_MAXLATT], rax
2:  cmp rsi, [r8+S_SMAXG]
    jbe 3f
    mov [r8+S_SMAXG], rsi
3:  cmp rdx, [r8+S_SMAXL]
    jbe 4f
    mov [r8+S_SMAXL], rdx
4:  cmp rsi, [r8+P_THRESH]
    jb 5f
    mov rdi, [r8+P_ECAP]
    dec rdi
    and rdi, [r8+S_EVENTS]
    shl rdi, 5
    add rdi, [r8+P_EBASE]
    mov [rdi], rax
    mov [rdi+8], rsi
    mov [rdi+16], rdx
    mov [rdi+24], rbx
    inc qword ptr [r8+S_EVENTS]
5:  cmp rax, [r8+S_SNEXT]
    jb 6f
    mov rdi, [r8+P_SCAP]
    dec rdi
    and rdi, [r8+S_SERIES]
    shl rdi, 5
    add rdi, [r8+P_SBASE]
    mov [rdi], rax
    mov [rdi+8], r15
    mov rcx, [r8+S_SMAXG]
    mov [rdi+16], rcx
    mov rcx, [r8+S_SMAXL]
    mov [rdi+24], rcx
    inc qword ptr [r8+S_SERIES]
    xor ecx, ecx
    mov [r8+S_SMAXG], rcx
    mov [r8+S_SMAXL], rcx
    add rax, [r8+P_SINT]
    mov [r8+S_SNEXT], rax
6:  mov rax, [r8+P_MAXIT]
    test rax, rax
    jz loop
    cmp r15, rax
    jb loop
finish:
    mov qword ptr [r8+S_PHASE], 3
    test qword ptr [r8+P_PORT], 2
    jz 7f
    mov dx, 0xf4
    mov eax, 1
    out dx, eax
7:  pause
    jmp 7b

control:
    mov rax, [r8+S_CTRL]
    cmp rax, 2
    jne 1f
    mov qword ptr [r8+S_CTRL], 0
    jmp finish
1:  xor eax, eax
    mov edi, LATH
    mov ecx, 512
    rep stosq
    mov edi, PARAM+GAPH
    mov ecx, 64
    rep stosq
    mov [r8+S_MAXGAP], rax
    mov [r8+S_MAXGAPT], rax
    mov [r8+S_MAXLAT], rax
    mov [r8+S_MAXLATT], rax
    mov [r8+S_EVENTS], rax
    mov [r8+S_SERIES], rax
    mov [r8+S_SUMLAT], rax
    mov [r8+S_SMAXG], rax
    mov [r8+S_SMAXL], rax
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov r14, rax
    add rax, [r8+P_SINT]
    mov [r8+S_SNEXT], rax
    mov qword ptr [r8+S_CTRL], 0
    jmp loop

# fill rdi..rdi+rcx: word at address a = mix(a + seed), checkable without state
fill:
    test rcx, rcx
    jz 2f
    add rcx, rdi
    mov r10, 0xBF58476D1CE4E5B9
    mov r11, 0x94D049BB133111EB
    mov rsi, [r8+P_SEED]
1:  lea rax, [rdi+rsi]
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
    mov [rdi], rax
    add rdi, 8
    cmp rdi, rcx
    jb 1b
2:  ret
    .balign 16
payload_end:
