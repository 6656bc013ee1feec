# idle: fills its slice, then does nothing but look at the clock: the only page it writes is its record.
    .macro NAME
    .ascii "idle\0\0\0\0"
    .endm
    .include "common.S"

work:
    mov ecx, 64
1:  pause
    dec ecx
    jnz 1b
    PACE
    NOW
    mov rdi, rax
    NOW
    RECORD
    jmp work
