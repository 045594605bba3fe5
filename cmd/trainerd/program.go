package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"

	"trainerd/internal/fault"
	"trainerd/internal/tracing"
	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/server"
	"trainerd/storage"
	"trainerd/trainer"
)

// Program is the server as a value: Start listens and returns, Close stops it
// gracefully. Tests and the demo start it on port 0.
type Program struct {
	Config Config
	Log    *slog.Logger

	addr    net.Addr
	http    *http.Server
	api     *server.Server
	manager *trainer.Manager
	device  kernels.Device
	gate    *gate
	served  chan error
	spans   *tracing.Provider // nil: none
}

// Values of cuda_algorithms.
const (
	algorithmsTimed = "timed"
	algorithmsFirst = "first"
)

// Values of cuda_attention, as kernels/cuda has them.
const (
	attentionMMA   = "mma"
	attentionWgmma = "wgmma"
)

// deviceOptions are what a device is opened with beside its name; the zero value serves benchmarks.
type deviceOptions struct {
	memory     int64  // of the CPU device; 0: what the host has
	algorithms string // of CUDA: cuda_algorithms; "" is algorithmsTimed
	attention  string // of CUDA: cuda_attention; "" is attentionMMA
	data       string // directory that keeps what was timed; "": nowhere
}

// deviceOptions are the server's.
func (c Config) deviceOptions() deviceOptions {
	return deviceOptions{memory: c.DeviceMemory, algorithms: c.CUDAAlgorithms, attention: c.CUDAAttention, data: c.Data}
}

// openDevice opens "cpu" or "cuda:N"; "auto" takes the first CUDA device there
// is, else the CPU. What nobody would use is refused.
func openDevice(name string, workers int) (kernels.Device, error) {
	return openDeviceWith(name, workers, deviceOptions{})
}

func openDeviceWith(name string, workers int, o deviceOptions) (kernels.Device, error) {
	if name == "cpu" && o.algorithms == algorithmsFirst {
		return nil, fault.BadField("cuda_algorithms", o.algorithms, algorithmsTimed+": the device cpu has none to choose from")
	}
	if o.attention == attentionWgmma && (name == "cpu" || name == "auto" && !cudaBuilt) {
		return nil, fault.BadField("cuda_attention", o.attention, attentionMMA+": wgmma is a CUDA card's, and the device is the CPU")
	}
	switch {
	case name == "cpu", name == "auto" && !cudaBuilt:
		return cpu.New(workers, cpu.Memory(o.memory))
	case name == "auto":
		d, err := openCUDA(0, o)
		switch {
		case err == nil && workers > 0:
			return nil, errors.Join(fault.BadField("workers", workers, "0, or the device cpu: auto found a CUDA device"), d.Close())
		case err == nil || o.attention == attentionWgmma:
			return d, err
		}
		return cpu.New(workers, cpu.Memory(o.memory))
	case strings.HasPrefix(name, "cuda:"):
		n, err := strconv.Atoi(strings.TrimPrefix(name, "cuda:"))
		if err != nil || n < 0 {
			return nil, fault.BadField("device", name, "cpu, auto or cuda:N")
		}
		if workers > 0 {
			return nil, fault.BadField("workers", workers, "0: only the device cpu has workers")
		}
		return openCUDA(n, o)
	}
	return nil, fault.BadField("device", name, "cpu, auto or cuda:N")
}

// Start opens device, store and database, and serves. What it opened is closed again when it fails.
func (p *Program) Start(ctx context.Context) (err error) {
	log := slog.New(server.WithRequestIDs(p.Log.Handler()))
	if p.gate, err = openGate(p.Config, log); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			p.gate.close()
		}
	}()
	store, err := openStore(ctx, p.Config.ObjectStore, p.Config.Store)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	p.device, err = openDeviceWith(p.Config.Device, p.Config.Workers, p.Config.deviceOptions())
	if err != nil {
		return fmt.Errorf("open device: %w", err)
	}
	defer func() {
		if err != nil {
			p.device.Close()
		}
	}()
	var tracer trace.Tracer
	if tracer, p.spans, err = p.Config.Tracing.start(ctx, "trainerd", log); err != nil {
		return err
	}
	opened := p.device.Info().Name
	p.manager, err = trainer.NewManager(trainer.Options{
		Device: p.device, DataDir: p.Config.Data, Store: store, Logger: log, Tracer: tracer, Version: engineVersion(),
		Sources:   p.gate.sources.Resolve,
		PeakFLOPS: 1e12 * p.Config.PeakTFLOPS,
		Reopen: func() (kernels.Device, error) { // the same one: auto might choose another
			return openDeviceWith(opened, p.Config.Workers, p.Config.deviceOptions())
		},
		DeviceMemory: p.Config.DeviceMemory, SwapMemory: p.Config.swapMemory(p.device), SwapHold: time.Duration(p.Config.SwapHold),
		OpenStore: func(ctx context.Context, url string) (storage.Blob, error) {
			return openStore(ctx, p.Config.ObjectStore, url)
		},
		Limits: trainer.Limits{
			MaxBatchBytes: p.Config.MaxBodyBytes, MaxBatchRows: p.Config.MaxBatchRows, MaxBatchTokens: p.Config.MaxBatchTokens,
			MaxQueuedRollouts: p.Config.MaxQueueRows, MaxQueuedTokens: p.Config.MaxQueueTokens, MaxQueuedBytes: p.Config.MaxQueueBytes,
			MaxCaptureBytes: p.Config.MaxCaptureBytes,
		},
	})
	if err != nil {
		return fmt.Errorf("open data directory %s: %w", p.Config.Data, err)
	}
	l, err := net.Listen("tcp", p.Config.Listen)
	if err != nil {
		p.manager.Close(ctx)
		return fmt.Errorf("listen: %w", err)
	}
	p.addr = l.Addr()
	p.api = server.New(server.Options{Manager: p.manager, Logger: log, Tracer: tracer, Version: engineVersion(), Guard: p.gate.guard.Middleware})
	p.http = p.api.HTTPServer()
	p.served = make(chan error, 1)
	go func() { p.served <- p.gate.serve(p.http, l, p.Config.MaxConnections) }()
	return nil
}

// URL returns the server's base address.
func (p *Program) URL() string { return p.gate.scheme() + "://" + p.addr.String() }

// Close stops intake, lets the running step finish, writes what is pending and
// frees the device. Requests get half of the time that ctx leaves; then they are
// cut off, since the step must not pay for them.
func (p *Program) Close(ctx context.Context) error {
	p.api.Drain()
	p.api.Close() // ends streams and long polls, which Shutdown would wait for
	answering, cancel := halfOf(ctx)
	defer cancel()
	err := p.http.Shutdown(answering)
	if err != nil {
		p.Log.Warn("requests were cut off", "err", err)
		err = p.http.Close()
	}
	if serr := <-p.served; serr != nil && !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return errors.Join(err, p.manager.Close(ctx), p.closeDevice(), p.gate.close(), p.spans.Close(ctx))
}

// closeDevice closes the device that the manager used last, if it has one.
func (p *Program) closeDevice() error {
	if dev := p.manager.Device(); dev != nil {
		return dev.Close()
	}
	return nil
}

// swapMemory is the host memory for models that are off the device. Without a
// limit of its own the CPU device has all memory there is, and nothing would be
// gained by moving a model within it.
func (c Config) swapMemory(dev kernels.Device) int64 {
	onHost := dev.Info().Name == "cpu"
	switch {
	case c.SwapMemory >= 0:
		return c.SwapMemory
	case onHost && c.DeviceMemory == 0:
		return 0
	}
	_, free := cpu.HostMemory()
	if onHost {
		free -= c.DeviceMemory
	}
	return max(0, free/2)
}

// halfOf returns a context that ends when half of the time to ctx's deadline is over.
func halfOf(ctx context.Context) (context.Context, context.CancelFunc) {
	at, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Until(at)/2)
}
