//go:build cudaemu

package cuda

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
typedef int (*launch_fn)(const char *, unsigned, unsigned, unsigned, unsigned, unsigned, const void *, size_t);
static int launch(void *f, const char *name, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, const void *args, size_t size) {
	return ((launch_fn)f)(name, gx, gy, bx, by, shared, args, size);
}
*/
import "C"

import (
	"errors"
	"fmt"
	"math"
	"syscall"
	"unsafe"

	"trainerd/kernels"
)

// OpenEmulated takes a device whose memory is the host's and whose kernels run on
// the emulator in the given library; products are plain loops.
func OpenEmulated(library string) (*Device, error) {
	return newDevice(kernels.Info{Name: "cuda:emulated", Model: "emulator", Workers: 1}, func() (driver, error) {
		name := C.CString(library)
		defer C.free(unsafe.Pointer(name))
		lib := C.dlopen(name, C.RTLD_NOW)
		if lib == nil {
			return nil, fmt.Errorf("open the emulator: %s", C.GoString(C.dlerror()))
		}
		symbol := C.CString("emulated_launch")
		defer C.free(unsafe.Pointer(symbol))
		f := C.dlsym(lib, symbol)
		if f == nil {
			return nil, errors.New("open the emulator: it has no emulated_launch")
		}
		return &emulated{launchFn: f, maps: map[address][]byte{}}, nil
	})
}

// emulated is a driver that does everything at once.
type emulated struct {
	launchFn unsafe.Pointer
	maps     map[address][]byte
	used     int64
}

const emulatedMemory = 8 << 30

// page is what mappings and their guards are made of.
const page = 4096

// alloc ends every allocation at a page that cannot be touched, and fills it with NaN.
func (e *emulated) alloc(n int64) (address, error) {
	if e.used+n > emulatedMemory {
		return 0, errNoMemory
	}
	room := (kernels.Round(n, alignment) + page - 1) / page * page
	m, err := syscall.Mmap(-1, 0, int(room)+page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return 0, err
	}
	if err := syscall.Mprotect(m[room:], syscall.PROT_NONE); err != nil {
		return 0, err
	}
	if n < 1<<20 {
		for i := range m[:room] {
			m[i] = 0xff
		}
	}
	at := address(uintptr(unsafe.Pointer(unsafe.SliceData(m)))) + address(room-kernels.Round(n, alignment))
	e.maps[at] = m
	e.used += n
	return at, nil
}

func (e *emulated) free(at address) error {
	m, ok := e.maps[at]
	if !ok {
		return fmt.Errorf("free of %#x, which is no allocation", at)
	}
	delete(e.maps, at)
	return syscall.Munmap(m)
}

func (e *emulated) memory() (free, total int64, err error) {
	return emulatedMemory - e.used, emulatedMemory, nil
}

func (e *emulated) pinned(n int) ([]byte, error) { return make([]byte, n), nil }

func (e *emulated) launch(kernel string, grid, block size2, shared int, args ...any) error {
	packed := pack(nil, args)
	name := C.CString(kernel)
	defer C.free(unsafe.Pointer(name))
	r := C.launch(e.launchFn, name, C.uint(grid.x), C.uint(grid.y), C.uint(block.x), C.uint(block.y), C.uint(shared), unsafe.Pointer(unsafe.SliceData(packed)), C.size_t(len(packed)))
	switch r {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("no kernel %s", kernel)
	}
	return fmt.Errorf("launch %s with %d bytes of parameters, which are not its own", kernel, len(packed))
}

// at views device memory.
func at[T any](a address, n int) []T {
	return unsafe.Slice((*T)(*(*unsafe.Pointer)(unsafe.Pointer(&a))), n)
}

func widen(b uint16) float32 { return math.Float32frombits(uint32(b) << 16) }

func narrow(x float32) uint16 {
	b := math.Float32bits(x)
	if x != x {
		return 0x7fff
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

// operand reads op(X) of a stored column-major matrix as rows [n][k], the product running along k.
func operand(a address, n, k, ld int, kFirst bool) []float32 {
	out := make([]float32, n*k)
	last := (k-1)*ld + n
	if kFirst {
		last = (n-1)*ld + k
	}
	x := at[uint16](a, last)
	for i := range n {
		for j := range k {
			if kFirst {
				out[i*k+j] = widen(x[i*ld+j])
			} else {
				out[i*k+j] = widen(x[j*ld+i])
			}
		}
	}
	return out
}

func (e *emulated) product(p product) error {
	a, b := operand(p.a, p.m, p.k, p.lda, p.transA), operand(p.b, p.n, p.k, p.ldb, !p.transB)
	for j := range p.n {
		for i := range p.m {
			sum := float32(0)
			x, y := a[i*p.k:][:p.k], b[j*p.k:][:p.k]
			for l := range x {
				sum += x[l] * y[l]
			}
			if p.float32C {
				c := at[float32](p.c+4*address(j*p.ldc+i), 1)
				if p.accumulate {
					sum += c[0]
				}
				c[0] = sum
				continue
			}
			c := at[uint16](p.c+2*address(j*p.ldc+i), 1)
			if p.accumulate {
				sum += widen(c[0])
			}
			if p.bias != 0 {
				sum += widen(at[uint16](p.bias, p.m)[i])
			}
			c[0] = narrow(sum)
		}
	}
	return nil
}

func (e *emulated) fill(dst address, value byte, n int64) error {
	x := at[byte](dst, int(n))
	for i := range x {
		x[i] = value
	}
	return nil
}

func (e *emulated) move(dst, src address, n int64) error {
	copy(at[byte](dst, int(n)), at[byte](src, int(n)))
	return nil
}

func (e *emulated) upload(dst address, src []byte) error {
	copy(at[byte](dst, len(src)), src)
	return nil
}

func (e *emulated) download(dst []byte, src address) error {
	copy(dst, at[byte](src, len(dst)))
	return nil
}

func (e *emulated) mark(int) error  { return nil }
func (e *emulated) wait(int) error  { return nil }
func (e *emulated) sync() error     { return nil }
func (e *emulated) lost(error) bool { return false }

func (e *emulated) close() error {
	for at := range e.maps {
		if err := e.free(at); err != nil {
			return err
		}
	}
	return nil
}
