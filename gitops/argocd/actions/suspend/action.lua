-- The operator saves a checkpoint, then takes the job to zero pods.
obj.spec.suspend = true
return obj
