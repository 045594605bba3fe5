package words

import "golang.org/x/sys/cpu"

var fast = cpu.X86.HasAVX2

// greatest is Greatest of n blocks, 1 or more.
//
//go:noescape
func greatest(p *byte, n int) (signed int32, unsigned uint32)
