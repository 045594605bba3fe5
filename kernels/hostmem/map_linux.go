package hostmem

import (
	"errors"
	"syscall"
	"unsafe"
)

const (
	hugePage          = 2 << 20
	madvPopulateWrite = 23 // Linux 5.14; on older kernels pages are faulted in on use
)

// mapped maps memory and touches it now. Huge pages are those that the system grants.
func mapped(n int64, pages Pages) (*Span, error) {
	raw, err := syscall.Mmap(-1, 0, int(n)+hugePage, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return nil, err
	}
	skip := int64(-uintptr(unsafe.Pointer(unsafe.SliceData(raw))) & (hugePage - 1))
	s := &Span{Bytes: raw[skip : skip+n : skip+n], raw: raw}
	if pages == Huge {
		_ = syscall.Madvise(raw, syscall.MADV_HUGEPAGE) // a hint; without it only speed is lost
	}
	if err := syscall.Madvise(s.Bytes, madvPopulateWrite); err != nil && !errors.Is(err, syscall.EINVAL) {
		s.Free()
		return nil, err
	}
	return s, nil
}

// Free gives the memory back. It may be called again.
func (s *Span) Free() {
	if s.raw != nil {
		_ = syscall.Munmap(s.raw)
	}
	*s = Span{}
}
