package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"trainerd/internal/fault"
	"trainerd/storage"
	"trainerd/storage/s3"
)

// Config is the server's configuration: defaults, then a JSON file, then the
// environment (TRAINERD_ and the member's name in capitals), then flags (the
// member's name with dashes). Every member is used; unknown ones are refused.
type Config struct {
	Listen   string `json:"listen" help:"address to listen on; port 0 picks one"`
	Data     string `json:"data" help:"directory of the database and the spools"`
	Device   string `json:"device" help:"cpu, cuda:N or auto"`
	Workers  int    `json:"workers" help:"CPU workers; 0: one per core"`
	Store    string `json:"store" help:"checkpoints go to dir:PATH or s3://bucket/prefix; empty: dir:DATA/store"`
	Insecure bool   `json:"insecure" help:"serve beyond loopback although there is no authentication"`

	S3Endpoint  string `json:"s3_endpoint" help:"host:port or URL of the object store"`
	S3Region    string `json:"s3_region" help:"region of the object store"`
	S3PathStyle bool   `json:"s3_path_style" help:"address buckets as path elements"`
	S3AccessKey string `json:"s3_access_key" help:"access key; better by environment" secret:"true"`
	S3SecretKey string `json:"s3_secret_key" help:"secret key; better by environment" secret:"true"`

	MaxBodyBytes   int64    `json:"max_body_bytes" help:"largest request body, and largest decompressed batch"`
	MaxBatchRows   int      `json:"max_batch_rows" help:"most rollouts of one batch"`
	MaxBatchTokens int64    `json:"max_batch_tokens" help:"most tokens of one batch, prompts counted per row"`
	MaxQueueRows   int      `json:"max_queue_rows" help:"most rollouts a job may have queued before it answers 429"`
	MaxQueueTokens int64    `json:"max_queue_tokens" help:"most tokens a job may have queued before it answers 429"`
	Shutdown       Duration `json:"shutdown" help:"how long a graceful stop may take"`
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
		S3PathStyle:  true,
		MaxBodyBytes: 256 << 20, MaxBatchRows: 1 << 16, MaxBatchTokens: 64 << 20,
		MaxQueueRows: 1 << 20, MaxQueueTokens: 512 << 20,
		Shutdown: Duration(60 * time.Second),
	}
}

// member is one setting: its name and where it lives.
type member struct {
	name   string
	field  reflect.StructField
	target reflect.Value
}

func (c *Config) members() []member {
	v := reflect.ValueOf(c).Elem()
	var out []member
	for i := range v.NumField() {
		f := v.Type().Field(i)
		out = append(out, member{name: f.Tag.Get("json"), field: f, target: v.Field(i)})
	}
	return out
}

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
	case *Duration:
		if err := p.UnmarshalText([]byte(text)); err != nil {
			return fault.BadField(m.name, text, `a duration such as "30s"`)
		}
	default:
		panic("config: unhandled type of " + m.name)
	}
	return nil
}

// bindFlags declares one flag per member, with the defaults shown.
func bindFlags(fs *pflag.FlagSet) {
	d := DefaultConfig()
	for _, m := range d.members() {
		name := strings.ReplaceAll(m.name, "_", "-")
		if m.target.Kind() == reflect.Bool {
			fs.Bool(name, m.target.Bool(), m.field.Tag.Get("help"))
			continue
		}
		def := fmt.Sprint(m.target.Interface())
		if p, ok := m.target.Addr().Interface().(*Duration); ok {
			def = time.Duration(*p).String()
		}
		fs.String(name, def, m.field.Tag.Get("help"))
	}
	fs.String("config", "", "JSON file of settings")
}

// LoadConfig layers defaults, file, environment and flags, then validates.
func LoadConfig(fs *pflag.FlagSet, getenv func(string) (string, bool)) (Config, error) {
	c := DefaultConfig()
	if path, _ := fs.GetString("config"); path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return c, fmt.Errorf("read configuration: %w", err)
		}
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&c); err != nil {
			return c, fmt.Errorf("parse configuration %s: %w", path, err)
		}
		if _, err := dec.Token(); err != io.EOF {
			return c, fmt.Errorf("parse configuration %s: text after the object", path)
		}
	}
	for _, m := range c.members() {
		if v, ok := getenv("TRAINERD_" + strings.ToUpper(m.name)); ok {
			if err := m.set(v); err != nil {
				return c, fmt.Errorf("environment: %w", err)
			}
		}
		if f := fs.Lookup(strings.ReplaceAll(m.name, "_", "-")); f != nil && f.Changed {
			if err := m.set(f.Value.String()); err != nil {
				return c, fmt.Errorf("flags: %w", err)
			}
		}
	}
	// The names that every S3 client knows serve when ours are not set.
	for name, p := range map[string]*string{"AWS_ACCESS_KEY_ID": &c.S3AccessKey, "AWS_SECRET_ACCESS_KEY": &c.S3SecretKey, "AWS_ENDPOINT_URL": &c.S3Endpoint, "AWS_REGION": &c.S3Region} {
		if v, ok := getenv(name); ok && *p == "" {
			*p = v
		}
	}
	if c.Store == "" {
		c.Store = "dir:" + c.Data + "/store"
	}
	return c, c.Validate()
}

// Validate names the first member that cannot be used.
func (c Config) Validate() error {
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return fault.BadField("listen", c.Listen, "HOST:PORT")
	}
	ip := net.ParseIP(host)
	loopback := host == "localhost" || ip != nil && ip.IsLoopback()
	switch {
	case !loopback && !c.Insecure:
		return fault.BadField("listen", c.Listen, "a loopback address, or --insecure: there is no authentication yet")
	case c.Data == "":
		return fault.BadField("data", c.Data, "a directory")
	case c.Workers < 0:
		return fault.BadField("workers", c.Workers, "0 or more")
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
	case c.Shutdown <= 0:
		return fault.BadField("shutdown", time.Duration(c.Shutdown), "more than 0")
	}
	return nil
}

// s3Config returns how to reach an s3:// location.
func (c Config) s3Config(at storage.Location) s3.Config {
	return s3.Config{Endpoint: c.S3Endpoint, Bucket: at.Bucket, Prefix: at.Prefix, Region: c.S3Region,
		AccessKey: c.S3AccessKey, SecretKey: c.S3SecretKey, Secure: true, PathStyle: c.S3PathStyle, Proxy: http.ProxyFromEnvironment}
}

// Redacted returns the configuration for the log, secrets replaced.
func (c Config) Redacted() Config {
	for _, m := range c.members() {
		if m.field.Tag.Get("secret") == "true" && m.target.String() != "" {
			m.target.SetString("[redacted]")
		}
	}
	return c
}
