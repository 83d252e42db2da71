# Attestation policy of GPUs: set it as attestation/ID_gpu.
#
# Reference values, each a list of texts: gpu_models, gpu_driver_versions, gpu_vbios_versions. A
# claim whose values are not in force contradicts. That the report is signed, fresh and of a chain to
# the vendor's root is checked before any policy is asked.
#
# input: the evidence of the submodule, as a token has it.
package policy

import rego.v1

trust_claims := {
	"configuration": configuration,
	"executables": executables,
	"hardware": hardware,
}

config := input.nvidia.config

# AR4SI: 2 affirms, 97 contradicts.
default hardware := 97

hardware := 2 if input.nvidia.hwmodel in query_reference_value("gpu_models")

default configuration := 97

configuration := 2 if config.vbios_version in query_reference_value("gpu_vbios_versions")

default executables := 97

executables := 2 if config.driver_version in query_reference_value("gpu_driver_versions")
