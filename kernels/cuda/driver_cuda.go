//go:build cuda

package cuda

/*
#include "shim.h"
#include <stdlib.h>
*/
import "C"

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"
	"unsafe"

	"gorgonia.org/cu"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

//go:embed fatbin/*.fatbin
var fatbins embed.FS

// Open takes card number n of the machine.
func Open(n int, o Options) (*Device, error) {
	f := found{index: n, built: C.CUDA_VERSION}
	var text [512]C.char
	if f.status = int(C.trainerd_driver_status(&text[0], C.int(len(text)))); f.status < 0 {
		f.why = C.GoString(&text[0])
	}
	if f.status == 0 {
		f.driver = cu.Version()
		var err error
		if f.cards, err = cu.NumDevices(); err != nil {
			return nil, fmt.Errorf("open cuda:%d: count cards: %w", n, err)
		}
	}
	if err := f.checkDriver(); err != nil {
		return nil, err
	}
	card, err := cu.GetDevice(n)
	if err != nil {
		return nil, fmt.Errorf("open cuda:%d: %w", n, err)
	}
	info := kernels.Info{Name: fmt.Sprintf("cuda:%d", n)}
	if f.model, err = card.Name(); err != nil {
		return nil, fmt.Errorf("open cuda:%d: %w", n, err)
	}
	attributes := map[cu.DeviceAttribute]*int{
		cu.ComputeCapabilityMajor: &f.major, cu.ComputeCapabilityMinor: &f.minor, cu.MultiprocessorCount: &info.Workers,
	}
	for a, to := range attributes {
		if *to, err = card.Attribute(a); err != nil {
			return nil, fmt.Errorf("open cuda:%d: %w", n, err)
		}
	}
	info.Model = f.model
	if err := f.checkCard(); err != nil {
		return nil, err
	}
	return newDevice(info, o, func() (driver, error) { return openCard(f, card) })
}

// card is a driver on a CUDA context of its own.
type card struct {
	context cu.CUContext
	stream  cu.Stream
	events  map[int]cu.Event
	modules []cu.Module
	kernels map[string]*kernel
	lacks   map[string]bool // kernels that were looked for and are for newer cards
	pins    []unsafe.Pointer
	host    map[address]unsafe.Pointer // of mapped
	blas    *blas
	driver  int       // its version
	trial   stopwatch // of elapsed; nil until then
	buf     []byte    // of the launch being made
}

// kernel is a function with the dynamic shared memory it may use so far.
type kernel struct {
	fn     C.CUfunction
	shared int
}

// defaultShared is the dynamic shared memory that a kernel may use without asking.
const defaultShared = 48 << 10

// openCard runs on the thread that will own the context.
func openCard(f found, dev cu.Device) (_ driver, err error) {
	c := &card{events: map[int]cu.Event{}, kernels: map[string]*kernel{}, lacks: map[string]bool{}, host: map[address]unsafe.Pointer{}, driver: f.driver, buf: make([]byte, 0, 512)}
	if c.context, err = dev.MakeContext(cu.SchedAuto); err != nil {
		if errors.Is(err, cu.OutOfMemory) {
			return nil, fault.New(fault.TooLarge, "out_of_memory", "open cuda:%d: no memory for a context on %s: another process holds it", f.index, f.model)
		}
		return nil, fmt.Errorf("open cuda:%d: make a context: %w", f.index, err)
	}
	defer func() {
		if err != nil {
			_ = c.close()
		}
	}()
	if c.stream, err = cu.MakeStream(cu.NonBlocking); err != nil {
		return nil, fmt.Errorf("open cuda:%d: make a stream: %w", f.index, err)
	}
	if err = c.load(f); err != nil {
		return nil, err
	}
	if c.blas, err = openBlas(""); err != nil {
		return nil, fault.New(fault.Unavailable, "no_cublaslt", "open cuda:%d: cuBLASLt is missing (install cuBLAS of CUDA 13 or 12, or name its folder in LD_LIBRARY_PATH): %w", f.index, err)
	}
	return c, nil
}

// load takes every fatbin that was embedded.
func (c *card) load(f found) error {
	files, err := fs.Glob(fatbins, "fatbin/*.fatbin")
	if err != nil {
		return err
	}
	for _, name := range files {
		image, err := fatbins.ReadFile(name)
		if err != nil {
			return err
		}
		m, err := cu.LoadFatBinary(string(image))
		if err != nil {
			return f.noCode(name, err)
		}
		c.modules = append(c.modules, m)
	}
	return nil
}

func (c *card) kernel(name string) (*kernel, error) {
	if k, ok := c.kernels[name]; ok {
		return k, nil
	}
	for _, m := range c.modules {
		fn, err := m.Function(name)
		if err == nil {
			k := &kernel{fn: *(*C.CUfunction)(unsafe.Pointer(&fn)), shared: defaultShared}
			c.kernels[name] = k
			return k, nil
		}
		if !errors.Is(err, cu.NotFound) {
			return nil, fmt.Errorf("find kernel %s: %w", name, err)
		}
	}
	return nil, fmt.Errorf("no kernel %s in the fatbins", name)
}

func (c *card) has(name string) bool {
	if _, known := c.kernels[name]; known || c.lacks[name] {
		return known
	}
	_, err := c.kernel(name)
	c.lacks[name] = err != nil
	return err == nil
}

func (c *card) raw() C.CUstream { return *(*C.CUstream)(unsafe.Pointer(&c.stream)) }

func (c *card) launch(name string, grid, block size2, shared int, args ...any) error {
	k, err := c.kernel(name)
	if err != nil {
		return err
	}
	if shared > k.shared {
		if r := C.tr_allow_shared(k.fn, C.int(shared)); r != 0 {
			return fmt.Errorf("allow %s %d bytes of shared memory: %w", name, shared, result(r))
		}
		k.shared = shared
	}
	c.buf = pack(c.buf, args)
	r := C.tr_launch(k.fn, C.uint(grid.x), C.uint(grid.y), C.uint(block.x), C.uint(block.y), C.uint(shared), c.raw(), unsafe.Pointer(unsafe.SliceData(c.buf)), C.size_t(len(c.buf)))
	if r != 0 {
		return fmt.Errorf("launch %s, grid (%d,%d), block (%d,%d), %d bytes of shared memory: %w", name, grid.x, grid.y, block.x, block.y, shared, result(r))
	}
	return nil
}

// code is a CUresult from our own calls.
type code int

func result(r C.int) error { return code(r) }

func (c code) Error() string { return fmt.Sprintf("CUDA error %d", int(c)) }

// number returns the CUresult in an error; cu's own type is not exported, but it is an int.
func number(err error) int {
	var c code
	if errors.As(err, &c) {
		return int(c)
	}
	for n := range sticky {
		if errors.Is(err, sticky[n]) {
			return n
		}
	}
	return 0
}

// sticky lists the errors after which a context only fails.
var sticky = map[int]error{
	int(cu.EccUncorrectable): cu.EccUncorrectable, int(cu.IllegalAddress): cu.IllegalAddress, int(cu.LaunchTimeout): cu.LaunchTimeout,
	int(cu.Assert): cu.Assert, int(cu.HardwareStackError): cu.HardwareStackError, int(cu.IllegalInstruction): cu.IllegalInstruction,
	int(cu.MisalignedAddress): cu.MisalignedAddress, int(cu.InvalidAddressSpace): cu.InvalidAddressSpace, int(cu.InvalidPc): cu.InvalidPc,
	int(cu.LaunchFailed): cu.LaunchFailed, int(cu.NvlinkUncorrectable): cu.NvlinkUncorrectable, int(cu.ContextIsDestroyed): cu.ContextIsDestroyed,
	int(cu.Unknown): cu.Unknown,
}

func (c *card) lost(err error) bool {
	_, ok := sticky[number(err)]
	return ok
}

func (c *card) alloc(n int64) (address, error) {
	p, err := cu.MemAlloc(n)
	if errors.Is(err, cu.OutOfMemory) {
		return 0, errNoMemory
	}
	return address(p), err
}

func (c *card) mapped(n int64) (address, error) {
	var p unsafe.Pointer
	var at C.CUdeviceptr
	switch r := C.tr_mapped(&p, &at, C.size_t(n)); r {
	case 0:
	case C.CUDA_ERROR_OUT_OF_MEMORY:
		return 0, errNoMemory
	default:
		return 0, fmt.Errorf("cuMemHostAlloc: %w", result(r))
	}
	c.host[address(at)] = p
	return address(at), nil
}

func (c *card) free(a address) error {
	p, host := c.host[a]
	if !host {
		return cu.MemFree(cu.DevicePtr(a))
	}
	// Unlike cuMemFree this need not wait for what the card still does there.
	err := c.stream.Synchronize()
	delete(c.host, a)
	C.tr_unpin(p)
	return err
}

func (c *card) memory() (free, total int64, err error) { return cu.MemInfo() }

func (c *card) pinned(n int) ([]byte, error) {
	var p unsafe.Pointer
	if r := C.tr_pinned(&p, C.size_t(n)); r != 0 {
		return nil, result(r)
	}
	c.pins = append(c.pins, p)
	return unsafe.Slice((*byte)(p), n), nil
}

func (c *card) register(host []byte) error {
	if r := C.tr_register(unsafe.Pointer(unsafe.SliceData(host)), C.size_t(len(host))); r != 0 {
		return fmt.Errorf("cuMemHostRegister: %w", result(r))
	}
	return nil
}

func (c *card) unregister(host []byte) error {
	if r := C.tr_unregister(unsafe.Pointer(unsafe.SliceData(host))); r != 0 {
		return fmt.Errorf("cuMemHostUnregister: %w", result(r))
	}
	return nil
}

func (c *card) fill(dst address, value byte, n int64) error {
	return cu.MemsetD8Async(cu.DevicePtr(dst), value, n, c.stream)
}

func (c *card) move(dst, src address, n int64) error {
	return cu.MemcpyDtoDAsync(cu.DevicePtr(dst), cu.DevicePtr(src), n, c.stream)
}

func (c *card) upload(dst address, src []byte) error {
	return cu.MemcpyHtoDAsync(cu.DevicePtr(dst), unsafe.Pointer(unsafe.SliceData(src)), int64(len(src)), c.stream)
}

func (c *card) download(dst []byte, src address) error {
	return cu.MemcpyDtoHAsync(unsafe.Pointer(unsafe.SliceData(dst)), cu.DevicePtr(src), int64(len(dst)), c.stream)
}

func (c *card) mark(event int) error {
	e, ok := c.events[event]
	if !ok {
		var err error
		if e, err = cu.MakeEvent(cu.DisableTiming); err != nil {
			return err
		}
		c.events[event] = e
	}
	return e.Record(c.stream)
}

func (c *card) wait(event int) error { return c.events[event].Synchronize() }

func (c *card) sync() error { return c.stream.Synchronize() }

func (c *card) algorithms(p product) ([]algorithm, error) { return c.blas.algorithms(p) }

func (c *card) admits(p product, a algorithm) error { return c.blas.admits(p, a) }

func (c *card) library() versions { return versions{c.driver, c.blas.version()} }

func (c *card) product(p product, a algorithm) error {
	err := c.blas.run(p, a, unsafe.Pointer(c.raw()))
	if err == nil || errors.Is(err, errUnsupported) {
		return err
	}
	// cuBLASLt has one status for all that goes wrong on the card; whether the context survived is the driver's to say.
	return errors.Join(err, c.stream.Synchronize())
}

func (c *card) elapsed(run func() error) (time.Duration, error) {
	if c.trial == nil {
		c.trial = c.stopwatch()
	}
	c.trial.start()
	if err := c.trial.stamp(); err != nil {
		return 0, err
	}
	if err := run(); err != nil {
		return 0, err
	}
	if err := c.trial.stamp(); err != nil {
		return 0, err
	}
	_, seconds, err := c.trial.read()
	return time.Duration(seconds * 1e9), err
}

// close destroys the context, which frees all of its memory, streams and modules,
// whatever state they are in.
func (c *card) close() error {
	if c.blas != nil {
		c.blas.close()
	}
	for _, p := range c.pins {
		C.tr_unpin(p)
	}
	if len(c.host) > 0 {
		_ = c.stream.Synchronize() // what it has to say was said, or the context is lost
	}
	for _, p := range c.host {
		C.tr_unpin(p)
	}
	return c.context.Destroy()
}
