package field

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// forbiddenHere are the older forms that only some architectures have.
var forbiddenHere = []uint32{}
