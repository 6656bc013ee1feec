# net: vCPU 0 sends frames to the network and checks those that come back, polling, at any privilege; each vCPU also visits
# random pages of its slice as hammer does.  The network must send every frame back.
#
# At P_AREA (see README.md):
    .set A_RECEIVE,      0x0000          # descriptors; the available ring at +0x80, the used ring at +0x200
    .set A_SEND,         0x1000          # as above
    .set A_RECORD,       0x4000
    .set A_HELD,         0x5000          # what each buffer holds: the buffer that was sent, counter
    .set A_BUFFERS,      0x10000         # pages: P_BUFFERS to send from, and as many to receive into

    .set R_AVAILABLE,    0x80
    .set R_USED,         0x200

    .set D_MAGIC,        0x00
    .set D_PHASE,        0x08            # 0 none, 1 a frame is on its way
    .set D_SENT_FROM,    0x10            # ... out of this buffer
    .set D_COUNTER,      0x18            # ... with this number
    .set D_BUFFER,       0x20            # ... into this buffer
    .set D_FRAMES,       0x28            # that came back
    .set D_AGAIN,        0x30            # sent once more, since they did not come back
    .set D_OTHERS,       0x38            # came, and were not the one that is on its way
    .set D_WRONG,        0x40            # came back changed
    .set D_STATE,        0x48            # 1 at work; else why there is no network device
    .set D_RECEIVE,      0x50            # indices of the rings, as this end has them: available of receive
    .set D_RECEIVED,     0x58            # ... used of receive
    .set D_SEND,         0x60            # ... available of send

    .set ENTRIES,        8
    .set FRAME,          1512            # with its virtio header of 12 bytes
    .set CHECKED_FROM,   32              # there: number of the buffer, counter; then the pattern
    .set PATIENCE,       1 << 22

    .macro NAME
    .ascii "net\0\0\0\0\0"
    .endm
    .set HAS_PREPARE, 1
    .include "common.S"

    .include "virtio.S"
# Give the device descriptor 0 of a ring, whose index rax is in the record; rdx is lost
    .macro OFFER number, at, index
    mov rax, [rsi+A_RECORD+\index]
    mov rdx, rax
    and edx, ENTRIES-1
    mov word ptr [rsi+rdx*2+\at+R_AVAILABLE+4], 0
    inc rax
    mov [rsi+A_RECORD+\index], rax
    mfence
    mov [rsi+\at+R_AVAILABLE+2], ax
    mfence
    mov rdi, [rip+P_DEVICE]
    SET 0x50, \number
    .endm

# Before the work begins: find the device.  All registers but r8, r9 and rbp are free.
prepare:
    test rbp, rbp
    jz 1f
    ret
1:  mov rsi, [rip+P_AREA]
    mov rdi, [rip+P_DEVICE]
    mov rax, 0x313054454E5F4350          # "PC_NET01"
    mov [rsi+A_RECORD+D_MAGIC], rax
    AGREE 1, 0
    QUEUE 0, A_RECEIVE, A_RECEIVE+R_USED
    QUEUE 1, A_SEND, A_SEND+R_USED
    SET 0x70, 15
    mov qword ptr [rsi+A_RECORD+D_STATE], 1
    xor r12d, r12d
2:  mov r13, r12
    call exchange
    inc r12
    cmp r12, [rip+P_BUFFERS]
    jb 2b
    ret

    FAILED

work:
    test rbp, rbp
    jnz 1f
    SAVE
    mov rax, r13
    mul qword ptr [rip+P_BUFFERS]
    mov r12, rdx
    ror r13, 23
    mov rax, r13
    mul qword ptr [rip+P_BUFFERS]
    mov r13, rdx
    call exchange
    RESTORE
1:  VISIT_ANY
    jmp work

# Send a new frame out of buffer r12, and receive it in buffer r13 of the others.  Kept: rsi, r8, r9, r12, r14, r15, rbp
exchange:
    add r13, [rip+P_BUFFERS]
    mov [rsi+A_RECORD+D_SENT_FROM], r12
    mov [rsi+A_RECORD+D_BUFFER], r13
    inc qword ptr [rsi+A_RECORD+D_COUNTER]
    mov qword ptr [rsi+A_RECORD+D_PHASE], 1
    call make_frame
    mov [rsi+A_SEND], rdi                # the descriptors
    mov qword ptr [rsi+A_SEND+8], FRAME
    mov rdi, r13
    call buffer_address
    mov [rsi+A_RECEIVE], rdi
    mov rax, 0x0000000200000800          # 2048 bytes, to be written
    mov [rsi+A_RECEIVE+8], rax
    OFFER 0, A_RECEIVE, D_RECEIVE
send_frame:
    OFFER 1, A_SEND, D_SEND
    mov ecx, PATIENCE
await_frame:
    pause
    mov rax, [rsi+A_RECORD+D_RECEIVED]
    cmp [rsi+A_RECEIVE+R_USED+2], ax
    jne 1f
    dec ecx
    jnz await_frame
    inc qword ptr [rsi+A_RECORD+D_AGAIN]
    mov rax, [rsi+A_RECORD+D_SEND]       # not before the device has taken the one before
2:  pause
    cmp [rsi+A_SEND+R_USED+2], ax
    je send_frame
    mov rdx, [rsi+A_RECORD+D_RECEIVED]
    cmp [rsi+A_RECEIVE+R_USED+2], dx
    je 2b
1:  inc qword ptr [rsi+A_RECORD+D_RECEIVED]
    mov rdi, r13
    call buffer_address
    mov rax, [rsi+A_RECORD+D_COUNTER]
    cmp [rdi+CHECKED_FROM+8], rax
    je 3f
    inc qword ptr [rsi+A_RECORD+D_OTHERS]
    OFFER 0, A_RECEIVE, D_RECEIVE
    mov ecx, PATIENCE
    jmp await_frame
3:  call check_frame
    mov rdi, r12
    call hold
    mov rdi, r13
    call hold
    inc qword ptr [rsi+A_RECORD+D_FRAMES]
    mov qword ptr [rsi+A_RECORD+D_PHASE], 0
    ret

# Buffer rdi holds the frame.  rax, rdi are lost
hold:
    shl rdi, 4
    lea rdi, [rsi+rdi+A_HELD]
    mov [rdi], r12
    mov rax, [rsi+A_RECORD+D_COUNTER]
    mov [rdi+8], rax
    ret

# rdi = address of buffer rdi
buffer_address:
    shl rdi, 12
    lea rdi, [rsi+rdi+A_BUFFERS]
    ret

# rbx = mix(mix(buffer + seed) + counter) of the frame; r10, r11 = the factors of MIX.  rax, rdx are lost
base_of_frame:
    mov r10, 0xBF58476D1CE4E5B9
    mov r11, 0x94D049BB133111EB
    mov rax, [rip+P_SEED]
    add rax, r12
    MIX
    add rax, [rsi+A_RECORD+D_COUNTER]
    MIX
    mov rbx, rax
    ret

# Make the frame; rdi = its address
make_frame:
    call base_of_frame
    mov rdi, r12
    call buffer_address
    mov qword ptr [rdi], 0
    mov rax, 0xffffffff00000000          # to all
    mov [rdi+8], rax
    mov rax, 0x000200025452ffff          # from 52:54:02:00:02:00
    mov [rdi+16], rax
    mov rax, 0x0000b588                  # an experimental kind
    mov [rdi+24], rax
    mov [rdi+CHECKED_FROM], r12
    mov rax, [rsi+A_RECORD+D_COUNTER]
    mov [rdi+CHECKED_FROM+8], rax
    mov ecx, CHECKED_FROM+16
1:  mov rax, rcx
    MIX
    xor rax, rbx
    mov [rdi+rcx], rax
    add ecx, 8
    cmp ecx, FRAME
    jb 1b
    ret

# See whether what is at rdi is the frame
check_frame:
    call base_of_frame
    cmp [rdi+CHECKED_FROM], r12
    jne 2f
    mov ecx, CHECKED_FROM+16
1:  mov rax, rcx
    MIX
    xor rax, rbx
    cmp [rdi+rcx], rax
    jne 2f
    add ecx, 8
    cmp ecx, FRAME
    jb 1b
    ret
2:  inc qword ptr [rsi+A_RECORD+D_WRONG]
    ret
