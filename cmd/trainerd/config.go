package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"trainerd/internal/document"
	"trainerd/internal/fault"
	"trainerd/storage"
	"trainerd/storage/s3"
)

// Config is the server's configuration: defaults, then a JSON file, then the
// environment (TRAINERD_ and the member's name in capitals), then flags (the
// member's name with dashes). Every member is used; unknown ones are refused.
type Config struct {
	Listen  string `json:"listen" help:"address to listen on; port 0 picks one"`
	Data    string `json:"data" help:"directory of the database and the spools"`
	Device  string `json:"device" help:"cpu, cuda:N or auto"`
	Workers int    `json:"workers" help:"workers of the CPU device; 0: one per core"`

	CUDAAttention  string `json:"cuda_attention" help:"products in CUDA's attention kernels: mma (every card) or wgmma (compute capability 9.0 alone; not yet run on a card)"`
	CUDAAlgorithms string `json:"cuda_algorithms" help:"how matrix products on CUDA choose among cuBLASLt's algorithms: timed (once per kind, kept in the data directory) or first (the library's favourite)"`

	DeviceMemory int64    `json:"device_memory" help:"most bytes that models take on the device together; 0: what it has free at the start"`
	SwapMemory   int64    `json:"swap_memory" help:"most bytes of host memory for models of jobs that do not fit on the device together; 0: such jobs are refused; -1: half of what the host has free at the start"`
	SwapHold     Duration `json:"swap_hold" help:"how long a model that came to the device stays while its job has work and others wait"`

	Store    string `json:"store" help:"checkpoints go to dir:PATH or s3://bucket/prefix; empty: dir:DATA/store"`
	Insecure bool   `json:"insecure" help:"serve beyond loopback although there are no tokens"`

	Access
	ObjectStore
	Tracing

	MaxBodyBytes    int64    `json:"max_body_bytes" help:"largest request body, and largest decompressed batch"`
	MaxBatchRows    int      `json:"max_batch_rows" help:"most rollouts of one batch"`
	MaxBatchTokens  int64    `json:"max_batch_tokens" help:"most tokens of one batch, prompts counted per row"`
	MaxQueueRows    int      `json:"max_queue_rows" help:"most rollouts a job may have queued before it answers 429"`
	MaxQueueTokens  int64    `json:"max_queue_tokens" help:"most tokens a job may have queued before it answers 429"`
	MaxQueueBytes   int64    `json:"max_queue_bytes" help:"most bytes of rollouts a job may have queued in memory before it answers 429"`
	MaxCaptureBytes int64    `json:"max_capture_bytes" help:"most host memory for checkpoints on their way to the store; one beyond it is written while training waits"`
	PeakTFLOPS      float64  `json:"peak_tflops" help:"peak arithmetic of the device in TFLOP/s, which the metric mfu is a share of; 0: no mfu"`
	Drain           Duration `json:"drain" help:"how long after the signal to stop requests are still answered, with /readyz at 503"`
	Shutdown        Duration `json:"shutdown" help:"how long a graceful stop may take then; past it the step is cut short and the next start repeats it"`
}

// ObjectStore says how to reach s3:// locations, in every command that takes one.
type ObjectStore struct {
	S3Endpoint  string `json:"s3_endpoint" help:"host:port or URL of the object store"`
	S3Region    string `json:"s3_region" help:"region of the object store"`
	S3PathStyle bool   `json:"s3_path_style" help:"address buckets as path elements"`
	S3AccessKey string `json:"s3_access_key" help:"access key; better by environment" secret:"true"`
	S3SecretKey string `json:"s3_secret_key" help:"secret key; better by environment" secret:"true"`

	S3Timeout Duration `json:"s3_timeout" help:"longest time without a byte moving to or from the object store before a request is tried again"`
}

// Duration is a time.Duration written as text ("30s") in files.
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// DefaultConfig returns the configuration of a server that nothing was said to.
func DefaultConfig() Config {
	return Config{
		Listen: "127.0.0.1:8080", Data: "trainerd-data", Device: "auto",
		Access:       defaultAccess(),
		ObjectStore:  ObjectStore{S3PathStyle: true, S3Timeout: Duration(30 * time.Second)},
		Tracing:      defaultTracing(),
		MaxBodyBytes: 256 << 20, MaxBatchRows: 1 << 16, MaxBatchTokens: 64 << 20,
		MaxQueueRows: 1 << 20, MaxQueueTokens: 512 << 20, MaxQueueBytes: 2 << 30, MaxCaptureBytes: 8 << 30,
		CUDAAttention:  attentionMMA,
		CUDAAlgorithms: algorithmsTimed,
		SwapMemory:     -1, SwapHold: Duration(10 * time.Second),
		Shutdown: Duration(60 * time.Second),
	}
}

// member is one setting: its name and where it lives.
type member struct {
	name   string
	field  reflect.StructField
	target reflect.Value
}

// membersOf lists the settings of the struct that p points to, those of embedded structs included.
func membersOf(p any) []member {
	v := reflect.ValueOf(p).Elem()
	var out []member
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Anonymous {
			out = append(out, membersOf(v.Field(i).Addr().Interface())...)
			continue
		}
		out = append(out, member{name: f.Tag.Get("json"), field: f, target: v.Field(i)})
	}
	return out
}

// flag is the name of the member's flag.
func (m member) flag() string { return strings.ReplaceAll(m.name, "_", "-") }

func (m member) set(text string) error {
	switch p := m.target.Addr().Interface().(type) {
	case *string:
		*p = text
	case *bool:
		v, err := strconv.ParseBool(text)
		if err != nil {
			return fault.BadField(m.name, text, "true or false")
		}
		*p = v
	case *int:
		v, err := strconv.Atoi(text)
		if err != nil {
			return fault.BadField(m.name, text, "a whole number")
		}
		*p = v
	case *int64:
		v, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fault.BadField(m.name, text, "a whole number")
		}
		*p = v
	case *float64:
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return fault.BadField(m.name, text, "a number")
		}
		*p = v
	case *List:
		*p = List(text)
	case *Duration:
		if err := p.UnmarshalText([]byte(text)); err != nil {
			return fault.BadField(m.name, text, `a duration such as "30s"`)
		}
	default:
		panic("config: unhandled type of " + m.name)
	}
	return nil
}

// expected is what the member's value must be in a file.
func (m member) expected() string {
	switch m.target.Addr().Interface().(type) {
	case *string:
		return "a string"
	case *bool:
		return "true or false"
	case *int, *int64:
		return "a whole number"
	case *float64:
		return "a number"
	case *List:
		return "a string, several with commas"
	case *Duration:
		return `a duration such as "30s"`
	}
	panic("config: unhandled type of " + m.name)
}

// strangers are the names in environ that begin as settings do and name none: most
// likely a mistyped one. TRAINERD_TOKEN is that of clients, which may run beside a server.
func strangers(environ []string) []string {
	known := []string{"TRAINERD_TOKEN"}
	for _, m := range membersOf(new(Config)) {
		known = append(known, "TRAINERD_"+strings.ToUpper(m.name))
	}
	var names []string
	for _, e := range environ {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "TRAINERD_") && !slices.Contains(known, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// bindFlags declares one flag per member, with the defaults shown.
func bindFlags(fs *pflag.FlagSet, members []member) {
	for _, m := range members {
		if m.target.Kind() == reflect.Bool {
			fs.Bool(m.flag(), m.target.Bool(), m.field.Tag.Get("help"))
			continue
		}
		if p, ok := m.target.Interface().(List); ok {
			fs.Var(&listFlag{p}, m.flag(), m.field.Tag.Get("help"))
			continue
		}
		def := fmt.Sprint(m.target.Interface())
		if p, ok := m.target.Addr().Interface().(*Duration); ok {
			def = time.Duration(*p).String()
		}
		fs.String(m.flag(), def, m.field.Tag.Get("help"))
	}
}

// LoadConfig layers defaults, file, environment and flags, then validates.
func LoadConfig(fs *pflag.FlagSet, getenv func(string) (string, bool)) (Config, error) {
	c := DefaultConfig()
	if path, _ := fs.GetString("config"); path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return c, fmt.Errorf("read configuration: %w", err)
		}
		if err := fromFile(membersOf(&c), b); err != nil {
			return c, fmt.Errorf("configuration %s: %w", path, err)
		}
	}
	if err := override(membersOf(&c), fs, getenv); err != nil {
		return c, err
	}
	c.ObjectStore.complete(getenv)
	if c.Store == "" {
		c.Store = "dir:" + c.Data + "/store"
	}
	c.settleTokens()
	return c, c.Validate()
}

// LoadObjectStore reads how to reach s3:// locations from environment and flags.
func LoadObjectStore(fs *pflag.FlagSet, getenv func(string) (string, bool)) (ObjectStore, error) {
	o := DefaultConfig().ObjectStore
	err := override(membersOf(&o), fs, getenv)
	o.complete(getenv)
	return o, err
}

// fromFile reads one JSON object whose members are settings; null keeps a default.
func fromFile(members []member, b []byte) error {
	given, err := document.Members(b)
	if err != nil {
		return err
	}
	for _, g := range given {
		at := slices.IndexFunc(members, func(m member) bool { return m.name == g.Name })
		switch {
		case at < 0:
			return fault.BadField(g.Name, string(g.Value), "no such setting")
		case g.Again:
			return fault.BadField(g.Name, string(g.Value), "each setting once")
		}
		if err := json.Unmarshal(g.Value, members[at].target.Addr().Interface()); err != nil {
			return fault.BadField(g.Name, string(g.Value), members[at].expected())
		}
	}
	return nil
}

// override sets members from the environment, then from the flags that were given.
func override(members []member, fs *pflag.FlagSet, getenv func(string) (string, bool)) error {
	for _, m := range members {
		if v, ok := getenv("TRAINERD_" + strings.ToUpper(m.name)); ok {
			if err := m.set(v); err != nil {
				return fmt.Errorf("environment: %w", err)
			}
		}
		if f := fs.Lookup(m.flag()); f != nil && f.Changed {
			if err := m.set(f.Value.String()); err != nil {
				return fmt.Errorf("flags: %w", err)
			}
		}
	}
	return nil
}

// complete takes what is not set from the names that every S3 client knows.
func (o *ObjectStore) complete(getenv func(string) (string, bool)) {
	for name, p := range map[string]*string{"AWS_ACCESS_KEY_ID": &o.S3AccessKey, "AWS_SECRET_ACCESS_KEY": &o.S3SecretKey, "AWS_ENDPOINT_URL": &o.S3Endpoint, "AWS_REGION": &o.S3Region} {
		if v, ok := getenv(name); ok && *p == "" {
			*p = v
		}
	}
}

// Validate names the first member that cannot be used.
func (c Config) Validate() error {
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fault.BadField("listen", c.Listen, "HOST:PORT")
	}
	if err := c.validateAccess(); err != nil {
		return err
	}
	if err := c.Tracing.validate(); err != nil {
		return err
	}
	// Both are shown in the log.
	for name, address := range map[string]string{"s3_endpoint": c.S3Endpoint, "store": c.Store} {
		if strings.HasPrefix(address, "dir:") {
			continue
		}
		if _, rest, ok := strings.Cut(address, "://"); ok {
			address = rest
		}
		if host, _, _ := strings.Cut(address, "/"); strings.Contains(host, "@") {
			return fault.BadField(name, "an address with a user", "none in it: s3_access_key and s3_secret_key")
		}
	}
	switch {
	case c.Data == "":
		return fault.BadField("data", c.Data, "a directory")
	case c.CUDAAlgorithms != algorithmsTimed && c.CUDAAlgorithms != algorithmsFirst:
		return fault.BadField("cuda_algorithms", c.CUDAAlgorithms, algorithmsTimed+" or "+algorithmsFirst)
	case c.CUDAAttention != attentionMMA && c.CUDAAttention != attentionWgmma:
		return fault.BadField("cuda_attention", c.CUDAAttention, attentionMMA+" or "+attentionWgmma)
	case c.Workers < 0:
		return fault.BadField("workers", c.Workers, "0 or more")
	case c.DeviceMemory < 0:
		return fault.BadField("device_memory", c.DeviceMemory, "0 or more")
	case c.SwapMemory < -1:
		return fault.BadField("swap_memory", c.SwapMemory, "-1 or more")
	case c.SwapHold < 0:
		return fault.BadField("swap_hold", time.Duration(c.SwapHold), "0s or more")
	case c.MaxBodyBytes <= 0:
		return fault.BadField("max_body_bytes", c.MaxBodyBytes, "more than 0")
	case c.MaxBatchRows <= 0:
		return fault.BadField("max_batch_rows", c.MaxBatchRows, "more than 0")
	case c.MaxBatchTokens <= 0:
		return fault.BadField("max_batch_tokens", c.MaxBatchTokens, "more than 0")
	case c.MaxQueueRows <= 0:
		return fault.BadField("max_queue_rows", c.MaxQueueRows, "more than 0")
	case c.MaxQueueTokens <= 0:
		return fault.BadField("max_queue_tokens", c.MaxQueueTokens, "more than 0")
	case c.MaxQueueBytes <= 0:
		return fault.BadField("max_queue_bytes", c.MaxQueueBytes, "more than 0")
	case c.MaxCaptureBytes <= 0:
		return fault.BadField("max_capture_bytes", c.MaxCaptureBytes, "more than 0")
	case !(c.PeakTFLOPS >= 0 && c.PeakTFLOPS <= 1e9):
		return fault.BadField("peak_tflops", c.PeakTFLOPS, "0 or more")
	case c.Drain < 0:
		return fault.BadField("drain", time.Duration(c.Drain), "0 or more")
	case c.S3Timeout <= 0:
		return fault.BadField("s3_timeout", time.Duration(c.S3Timeout), "more than 0")
	case c.Shutdown <= 0:
		return fault.BadField("shutdown", time.Duration(c.Shutdown), "more than 0")
	}
	return nil
}

// s3Config returns how to reach an s3:// location.
func (o ObjectStore) s3Config(at storage.Location) s3.Config {
	return s3.Config{Endpoint: o.S3Endpoint, Bucket: at.Bucket, Prefix: at.Prefix, Region: o.S3Region,
		AccessKey: o.S3AccessKey, SecretKey: o.S3SecretKey, Secure: true, PathStyle: o.S3PathStyle, Stall: time.Duration(o.S3Timeout), Proxy: http.ProxyFromEnvironment}
}

// Redacted returns the configuration for the log, secrets replaced.
func (c Config) Redacted() Config {
	for _, m := range membersOf(&c) {
		if m.field.Tag.Get("secret") == "true" && m.target.String() != "" {
			m.target.SetString("[redacted]")
		}
	}
	return c
}
