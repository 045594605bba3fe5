// Package seal keeps kernels.Device and kernels.Buffer closed: only packages
// below trainerd/kernels can import it, so only they can implement a device.
package seal
