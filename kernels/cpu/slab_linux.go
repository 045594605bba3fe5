package cpu

import (
	"errors"
	"syscall"
	"unsafe"
)

const (
	hugePage          = 2 << 20
	madvPopulateWrite = 23 // Linux 5.14; on older kernels pages are faulted in on use
)

// mapSlab maps memory outside the Go heap, aligned to and backed by huge pages
// where the system grants them, and touches it now.
func mapSlab(bytes int64) (*slab, error) {
	raw, err := syscall.Mmap(-1, 0, int(bytes)+hugePage, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return nil, err
	}
	skip := int64(-uintptr(unsafe.Pointer(unsafe.SliceData(raw))) & (hugePage - 1))
	s := &slab{bytes: raw[skip : skip+bytes : skip+bytes], raw: raw}
	if bytes >= hugePage {
		_ = syscall.Madvise(raw, syscall.MADV_HUGEPAGE) // a hint; without it only speed is lost
	}
	if err := syscall.Madvise(s.bytes, madvPopulateWrite); err != nil && !errors.Is(err, syscall.EINVAL) {
		s.free()
		return nil, err
	}
	return s, nil
}

func (s *slab) free() {
	if s.raw != nil {
		_ = syscall.Munmap(s.raw)
	}
	*s = slab{}
}
