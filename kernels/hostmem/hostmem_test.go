package hostmem

import (
	"testing"
	"unsafe"
)

func TestSpans(t *testing.T) {
	for i, n := range []int64{0, 1, 63, 4096, Large - 1, Large, Large + 1, 5<<20 + 3} {
		pages := []Pages{Huge, Small}[i%2]
		s, err := Take(n, pages)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(s.Bytes)) != n || cap(s.Bytes) != len(s.Bytes) {
			t.Errorf("%d bytes wanted, got %d of %d", n, len(s.Bytes), cap(s.Bytes))
		}
		if at := uintptr(unsafe.Pointer(unsafe.SliceData(s.Bytes))); n > 0 && at%Alignment != 0 {
			t.Errorf("a span of %d bytes lies at %#x", n, at)
		}
		for i := range s.Bytes {
			if s.Bytes[i] != 0 {
				t.Fatalf("byte %d of %d is %d", i, n, s.Bytes[i])
			}
			s.Bytes[i] = 0xff
		}
		s.Free()
		if s.Bytes != nil {
			t.Error("a freed span still names its bytes")
		}
		s.Free()
	}
	if _, err := Take(1<<50, Small); err == nil {
		t.Error("a petabyte was taken")
	}
}

func TestViews(t *testing.T) {
	s, err := Take(64, Huge)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Free()
	f, rest := Floats(s.Bytes, 3)
	h, rest := Halves(rest, 5)
	if len(f) != 3 || len(h) != 5 || len(rest) != 64-12-10 {
		t.Fatalf("%d and %d values, %d bytes left", len(f), len(h), len(rest))
	}
	f[2], h[0] = 1, 0xabcd
	if got := s.Bytes[8:14]; got[2] != 0x80 || got[3] != 0x3f || got[4] != 0xcd || got[5] != 0xab {
		t.Errorf("bytes are % x, expected those of 1 and 0xabcd one after the other", got)
	}
	if x, rest := Floats(nil, 0); x != nil || rest != nil {
		t.Error("no values of no memory")
	}
	for name, fail := range map[string]func(){
		"beyond the end": func() { Floats(s.Bytes, 17) },
		"not aligned":    func() { Floats(s.Bytes[2:], 1) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			fail()
		}()
	}
}
