# What the workloads with a virtio device share: finding it, and giving it rings.  The device's registers are at rdi, its area
# at rsi.

# A register of the transport: eax is written, or a value
    .macro PUT register
    mov [rdi+\register], eax
    .endm
    .macro SET register, value
    mov eax, \value
    PUT \register
    .endm
    .macro FAIL_IF condition, why
    mov eax, \why
    j\condition failed
    .endm

# Find a device of that kind and agree on the low features and VERSION_1
    .macro AGREE kind, features
    cmp dword ptr [rdi], 0x74726976
    FAIL_IF ne, 100
    cmp dword ptr [rdi+8], \kind
    FAIL_IF ne, 101
    SET 0x70, 0
    SET 0x70, 1
    SET 0x70, 3
    SET 0x24, 0
    SET 0x20, \features
    SET 0x24, 1
    SET 0x20, 1                          # VERSION_1
    SET 0x70, 11
    mov eax, [rdi+0x70]
    test al, 8
    FAIL_IF z, 102
    .endm

# Give it a ring in the area, the available ring at +0x80
    .macro QUEUE number, ring, used
    SET 0x30, \number
    SET 0x38, ENTRIES
    lea rax, [rsi+\ring]
    PUT 0x80
    SET 0x84, 0
    lea rax, [rsi+\ring+0x80]
    PUT 0x90
    SET 0x94, 0
    lea rax, [rsi+\used]
    PUT 0xa0
    SET 0xa4, 0
    SET 0x44, 1
    mov word ptr [rsi+\ring+0x80], 1     # no interrupts
    .endm

# Without a device the guest stands still, and says why
    .macro FAILED
failed:
    mov [rsi+A_RECORD+D_STATE], rax
1:  pause
    jmp 1b
    .endm

# Write to a random page of the hot set, at the workload's pace
    .macro VISIT_ANY
    RANDOM
    mov rax, r13
    mul r10
    mov r12, rdx
    mov rbx, r12
    shl rbx, 12
    add rbx, r9
    PACE
    WRITE_PAGE
    RECORD
    .endm

# Whatever `work` needs is kept meanwhile
    .macro SAVE
    push r10
    push r12
    push r13
    push r14
    mov rsi, [rip+P_AREA]
    .endm
    .macro RESTORE
    pop r14
    pop r13
    pop r12
    pop r10
    .endm
