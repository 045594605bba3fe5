//go:build cudaemu

package cuda

/*
#include <dlfcn.h>
#include <stdlib.h>
typedef int (*launch_fn)(const char *, unsigned, unsigned, unsigned, unsigned, unsigned, const void *, size_t);
static int launch(void *f, const char *name, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, const void *args, size_t size) {
	return ((launch_fn)f)(name, gx, gy, bx, by, shared, args, size);
}
static int has(void *f, const char *name) { return ((int (*)(const char *))f)(name); }
static unsigned long long ticks(void *f) { return ((unsigned long long (*)(void))f)(); }
*/
import "C"

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"trainerd/kernels"
)

// OpenEmulated takes a device whose memory is the host's, whose kernels run on the
// emulator of a folder (emulator/build.sh), and whose products are the stand-in's for cuBLASLt there.
func OpenEmulated(folder string, o Options) (*Device, error) {
	return newDevice(kernels.Info{Name: "cuda:emulated", Model: "emulator", Workers: 1}, o, func() (driver, error) {
		launch, err := symbol(filepath.Join(folder, "libemulated.so"), "emulated_launch")
		if err != nil {
			return nil, err
		}
		has, err := symbol(filepath.Join(folder, "libemulated.so"), "emulated_has")
		if err != nil {
			return nil, err
		}
		standin := filepath.Join(folder, "libcublasLt.so.13")
		clock, err := symbol(standin, "standin_clock")
		if err != nil {
			return nil, err
		}
		b, err := openBlas(standin)
		if err != nil {
			return nil, err
		}
		return &emulated{launchFn: launch, hasFn: has, clockFn: clock, blas: b, maps: map[address]allocation{}, registered: map[*byte]int{}}, nil
	})
}

// symbol loads a library, for good, and finds a function in it.
func symbol(library, name string) (unsafe.Pointer, error) {
	file, function := C.CString(library), C.CString(name)
	defer C.free(unsafe.Pointer(file))
	defer C.free(unsafe.Pointer(function))
	lib := C.dlopen(file, C.RTLD_NOW)
	if lib == nil {
		return nil, fmt.Errorf("open the emulator: %s", C.GoString(C.dlerror()))
	}
	f := C.dlsym(lib, function)
	if f == nil {
		return nil, fmt.Errorf("open the emulator: %s has no %s", library, name)
	}
	return f, nil
}

// Break makes every later call fail as behind an illegal address: the context is lost.
func (d *Device) Break() {
	d.q.put(command{label: of("memory", "lost"), run: func(c driver) error {
		c.(*emulated).broken = errBroken
		return nil
	}})
}

// oneLaunch: the emulator's state is the process's.
var oneLaunch sync.Mutex

var errBroken = errors.New("an illegal memory access was encountered")

// emulated is a driver that does everything at once.
type emulated struct {
	broken                   error // what every call gives once it is set
	launchFn, hasFn, clockFn unsafe.Pointer
	blas                     *blas
	maps                     map[address]allocation
	registered               map[*byte]int // bytes
	used                     int64
}

// allocation is a mapping and the bytes of it that were asked for.
type allocation struct {
	mapped []byte
	n      int64
	host   bool
}

const emulatedMemory = 8 << 30

// page is what mappings and their guards are made of.
const page = 4096

// alloc ends every allocation at a page that cannot be touched, and fills it with NaN.
func (e *emulated) alloc(n int64) (address, error) {
	if e.broken != nil {
		return 0, e.broken
	}
	if e.used+n > emulatedMemory {
		return 0, errNoMemory
	}
	e.used += n
	return e.guarded(n, false)
}

// mapped is host memory, as all of the emulator's is, and takes none of the card's.
func (e *emulated) mapped(n int64) (address, error) {
	if e.broken != nil {
		return 0, e.broken
	}
	return e.guarded(n, true)
}

func (e *emulated) guarded(n int64, host bool) (address, error) {
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
	e.maps[at] = allocation{m, n, host}
	return at, nil
}

func (e *emulated) free(at address) error {
	if e.broken != nil {
		return e.broken
	}
	return e.unmap(at)
}

func (e *emulated) unmap(at address) error {
	m, ok := e.maps[at]
	if !ok {
		return fmt.Errorf("free of %#x, which is no allocation", at)
	}
	delete(e.maps, at)
	if !m.host {
		e.used -= m.n
	}
	return syscall.Munmap(m.mapped)
}

func (e *emulated) memory() (free, total int64, err error) {
	return emulatedMemory - e.used, emulatedMemory, e.broken
}

func (e *emulated) pinned(n int) ([]byte, error) { return make([]byte, n), nil }

func (e *emulated) register(host []byte) error {
	if e.broken != nil {
		return e.broken
	}
	first := unsafe.SliceData(host)
	from := uintptr(unsafe.Pointer(first))
	for at, n := range e.registered {
		if other := uintptr(unsafe.Pointer(at)); from < other+uintptr(n) && other < from+uintptr(len(host)) {
			return errors.New("register memory twice")
		}
	}
	e.registered[first] = len(host)
	return nil
}

func (e *emulated) unregister(host []byte) error {
	if e.broken != nil {
		return e.broken
	}
	first := unsafe.SliceData(host)
	if n, ok := e.registered[first]; !ok || n != len(host) {
		return errors.New("unregister memory that is not registered")
	}
	delete(e.registered, first)
	return nil
}

func (e *emulated) has(kernel string) bool {
	name := C.CString(kernel)
	defer C.free(unsafe.Pointer(name))
	return C.has(e.hasFn, name) != 0
}

func (e *emulated) launch(kernel string, grid, block size2, shared int, args ...any) error {
	if e.broken != nil {
		return e.broken
	}
	packed := pack(nil, args)
	name := C.CString(kernel)
	defer C.free(unsafe.Pointer(name))
	oneLaunch.Lock()
	defer oneLaunch.Unlock()
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

func (e *emulated) product(p product, a algorithm) error {
	if e.broken != nil {
		return e.broken
	}
	return e.blas.run(p, a, nil)
}

func (e *emulated) algorithms(p product) ([]algorithm, error) { return e.blas.algorithms(p) }

func (e *emulated) admits(p product, a algorithm) error { return e.blas.admits(p, a) }

func (e *emulated) library() versions { return versions{0, e.blas.version()} }

// elapsed reads the clock of the stand-in, which only its products move.
func (e *emulated) elapsed(run func() error) (time.Duration, error) {
	before := C.ticks(e.clockFn)
	err := run()
	return time.Duration(C.ticks(e.clockFn) - before), err
}

func (e *emulated) fill(dst address, value byte, n int64) error {
	if e.broken != nil {
		return e.broken
	}
	x := at[byte](dst, int(n))
	for i := range x {
		x[i] = value
	}
	return nil
}

func (e *emulated) move(dst, src address, n int64) error {
	if e.broken != nil {
		return e.broken
	}
	copy(at[byte](dst, int(n)), at[byte](src, int(n)))
	return nil
}

func (e *emulated) upload(dst address, src []byte) error {
	if e.broken != nil {
		return e.broken
	}
	copy(at[byte](dst, len(src)), src)
	return nil
}

func (e *emulated) download(dst []byte, src address) error {
	if e.broken != nil {
		return e.broken
	}
	copy(dst, at[byte](src, len(dst)))
	return nil
}

func (e *emulated) mark(int) error      { return e.broken }
func (e *emulated) wait(int) error      { return e.broken }
func (e *emulated) sync() error         { return e.broken }
func (e *emulated) lost(err error) bool { return errors.Is(err, errBroken) }

func (e *emulated) close() error {
	e.blas.close()
	for at := range e.maps {
		if err := e.unmap(at); err != nil {
			return err
		}
	}
	return nil
}
