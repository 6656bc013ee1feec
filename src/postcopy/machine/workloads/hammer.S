# hammer: every vCPU writes to its hot set as fast as it can, even ones at random pages, odd ones one
# page after the other.  All of it is dirty again before a link has carried it: precopy never ends.
    .macro NAME
    .ascii "hammer\0\0"
    .endm
    .include "common.S"

work:
    RANDOM
    test ebp, 1
    jnz 1f
    mov rax, r13
    mul r10
    mov r12, rdx                         # random number of a page: high half of state * pages
    jmp 2f
1:  inc r12
    cmp r12, r10
    jb 2f
    xor r12d, r12d
    inc qword ptr [r8+R_PASSES]
2:  mov rbx, r12
    shl rbx, 12
    add rbx, r9
    PACE
    WRITE_PAGE
    RECORD
    jmp work
