# disk: vCPU 0 writes and reads blocks of the drive, polling, at any privilege; each vCPU also visits random pages of its
# slice as hammer does.  Every block and every buffer is known to the record, so that a lost write of either side shows.
#
# At P_AREA (see README.md):
    .set A_RING,         0x0000          # descriptors; the available ring at +0x80
    .set A_USED,         0x1000
    .set A_HEADER,       0x2000          # of the request
    .set A_STATUS,       0x3000          # one byte, and the drive's serial number behind it
    .set A_RECORD,       0x4000
    .set A_BUFFERED,     0x5000          # what each buffer holds: block, counter
    .set A_COUNTERS,     0x8000          # one of each block
    .set A_BUFFERS,      0x10000         # pages

    .set D_MAGIC,        0x00
    .set D_PHASE,        0x08            # 0 none, 1 a write is in flight, 2 a read
    .set D_BLOCK,        0x10            # ... of this block
    .set D_COUNTER,      0x18            # ... which has, or is to have, this counter
    .set D_BUFFER,       0x20            # ... in this buffer
    .set D_WRITES,       0x28
    .set D_READS,        0x30
    .set D_FLUSHES,      0x38
    .set D_WRONG,        0x40            # reads that found something else
    .set D_ERRORS,       0x48            # requests that failed
    .set D_STATE,        0x50            # 1 at work; else why there is no drive
    .set D_CAPACITY,     0x58
    .set D_AVAILABLE,    0x60            # indices, as this end has them
    .set D_USED,         0x68

    .set IN,             0
    .set OUT,            1
    .set FLUSH,          4
    .set GET_ID,         8
    .set ENTRIES,        8

    .macro NAME
    .ascii "disk\0\0\0\0"
    .endm
    .set HAS_PREPARE, 1
    .include "common.S"

    .include "virtio.S"

# Before the work begins: find the drive, write every block once.  All registers but r8, r9 and rbp are free.
prepare:
    test rbp, rbp
    jz 1f
    ret
1:  mov rsi, [rip+P_AREA]
    mov rdi, [rip+P_DEVICE]
    mov rax, 0x31304B53445F4350          # "PC_DSK01"
    mov [rsi+A_RECORD+D_MAGIC], rax
    AGREE 2, 0x200                       # FLUSH
    QUEUE 0, A_RING, A_USED
    SET 0x70, 15
    mov eax, [rdi+0x100]
    mov [rsi+A_RECORD+D_CAPACITY], rax
    mov qword ptr [rsi+A_RECORD+D_STATE], 1
    mov r13d, GET_ID
    lea r11, [rsi+A_STATUS+8]
    mov r10d, 20
    call request
    xor r12d, r12d
2:  mov rax, r12
    xor edx, edx
    div qword ptr [rip+P_BUFFERS]
    mov r13, rdx
    call write_block
    inc r12
    cmp r12, [rip+P_BLOCKS]
    jb 2b
    ret

    FAILED

work:
    test rbp, rbp
    jnz 1f
    SAVE
    call pick                            # r12 = a block, r13 = a buffer
    call write_block
    mov r13, [rsp+8]
    rol r13, 29
    call pick
    call read_block
    test r15b, 31
    jnz 2f
    mov r13d, FLUSH
    call request
    inc qword ptr [rsi+A_RECORD+D_FLUSHES]
2:  RESTORE
1:  VISIT_ANY
    jmp work

# r12 = a block and r13 = a buffer, out of the random number in r13; rax, rdx are lost
pick:
    mov rax, r13
    mul qword ptr [rip+P_BLOCKS]
    mov r12, rdx
    ror r13, 23
    mov rax, r13
    mul qword ptr [rip+P_BUFFERS]
    mov r13, rdx
    ret

# Write block r12 anew from buffer r13.  Kept: rsi, r8, r9, r12, r14, r15, rbp
write_block:
    mov rax, [rsi+r12*8+A_COUNTERS]
    inc rax
    call begin_request
    mov qword ptr [rsi+A_RECORD+D_PHASE], 1
    call base_of_block
    xor ecx, ecx
1:  mov rax, rcx
    MIX
    xor rax, rbx
    mov [rdi+rcx], rax
    add ecx, 8
    cmp ecx, 4096
    jb 1b
    mov r13d, OUT
    call block_request
    mov rax, [rsi+A_RECORD+D_COUNTER]
    mov [rsi+r12*8+A_COUNTERS], rax
    inc qword ptr [rsi+A_RECORD+D_WRITES]
    jmp end_request

# Read block r12 into buffer r13 and see whether it is what was written.  Kept: as above
read_block:
    mov rax, [rsi+r12*8+A_COUNTERS]
    call begin_request
    mov qword ptr [rsi+A_RECORD+D_PHASE], 2
    mov r13d, IN
    call block_request
    mov r13, [rsi+A_RECORD+D_BUFFER]
    call base_of_block
    xor ecx, ecx
1:  mov rax, rcx
    MIX
    xor rax, rbx
    cmp [rdi+rcx], rax
    jne 2f
    add ecx, 8
    cmp ecx, 4096
    jb 1b
    jmp 3f
2:  inc qword ptr [rsi+A_RECORD+D_WRONG]
3:  inc qword ptr [rsi+A_RECORD+D_READS]
    jmp end_request

# Note block r12, its counter rax and buffer r13
begin_request:
    mov [rsi+A_RECORD+D_BLOCK], r12
    mov [rsi+A_RECORD+D_COUNTER], rax
    mov [rsi+A_RECORD+D_BUFFER], r13
    ret

# What the buffer holds now.  rax, rdx are lost
end_request:
    mov rdx, [rsi+A_RECORD+D_BUFFER]
    shl rdx, 4
    mov [rsi+rdx+A_BUFFERED], r12
    mov rax, [rsi+A_RECORD+D_COUNTER]
    mov [rsi+rdx+A_BUFFERED+8], rax
    mov qword ptr [rsi+A_RECORD+D_PHASE], 0
    ret

# rbx = mix(mix(block + seed) + counter), rdi = address of buffer r13; r10, r11 = the factors of MIX
base_of_block:
    mov r10, 0xBF58476D1CE4E5B9
    mov r11, 0x94D049BB133111EB
    mov rax, [rip+P_SEED]
    add rax, r12
    MIX
    add rax, [rsi+A_RECORD+D_COUNTER]
    MIX
    mov rbx, rax
    mov rdi, r13
    shl rdi, 12
    add rdi, rsi
    add rdi, A_BUFFERS
    ret

# Request r13 (IN, OUT) of block r12 with the buffer of the record
block_request:
    mov r11, [rsi+A_RECORD+D_BUFFER]
    shl r11, 12
    add r11, rsi
    add r11, A_BUFFERS
    mov r10d, 4096
# Request r13 with r10 bytes at r11 (FLUSH has none), and wait for its end.  rax, rdx, rdi are lost
request:
    mov [rsi+A_HEADER], r13              # kind, and 4 bytes that are reserved
    lea rax, [r12*8]
    mov [rsi+A_HEADER+8], rax
    mov byte ptr [rsi+A_STATUS], 0xff
    lea rax, [rsi+A_HEADER]
    mov [rsi+A_RING], rax
    mov rax, 0x0001000100000010          # 16 bytes, more, 1 is next
    mov [rsi+A_RING+8], rax
    mov [rsi+A_RING+16], r11
    mov [rsi+A_RING+24], r10d
    mov eax, 0x00020003                  # more, to be written; 2 is next
    cmp r13d, OUT
    jne 1f
    mov eax, 0x00020001
1:  mov [rsi+A_RING+28], eax
    cmp r13d, FLUSH
    jne 2f
    mov word ptr [rsi+A_RING+14], 2
2:  lea rax, [rsi+A_STATUS]
    mov [rsi+A_RING+32], rax
    mov rax, 0x0000000200000001          # 1 byte, to be written
    mov [rsi+A_RING+40], rax
    mov rax, [rsi+A_RECORD+D_AVAILABLE]
    mov rdx, rax
    and edx, ENTRIES-1
    mov word ptr [rsi+rdx*2+A_RING+0x84], 0
    inc rax
    mov [rsi+A_RECORD+D_AVAILABLE], rax
    mfence
    mov [rsi+A_RING+0x82], ax
    mfence
    mov rdi, [rip+P_DEVICE]
    xor eax, eax
    PUT 0x50
    mov rax, [rsi+A_RECORD+D_USED]
3:  pause
    cmp [rsi+A_USED+2], ax
    je 3b
    inc rax
    mov [rsi+A_RECORD+D_USED], rax
    cmp byte ptr [rsi+A_STATUS], 0
    je 4f
    inc qword ptr [rsi+A_RECORD+D_ERRORS]
4:  ret
