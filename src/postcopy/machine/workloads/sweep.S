# sweep: walks over all of its slice, page after page, at the pace of P_DELAY: reads a word in the
# middle of the page, then adds one to the counter.
    .macro NAME
    .ascii "sweep\0\0\0"
    .endm
    .include "common.S"

work:
    inc r12
    cmp r12, r10
    jb 1f
    xor r12d, r12d
    inc qword ptr [r8+R_PASSES]
1:  mov rbx, r12
    shl rbx, 12
    add rbx, r9
    PACE
    mov rax, [rbx+2048]
    WRITE_PAGE
    RECORD
    jmp work
